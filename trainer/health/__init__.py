"""What looks after a run while it trains: hangs, slow ranks, collapse, lost numbers."""
