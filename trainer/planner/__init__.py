"""Whether a run fits a cluster, what it moves, how long it takes: counted before anyone queues."""
