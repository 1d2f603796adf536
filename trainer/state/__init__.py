"""The folder of a run and what lies in it: status, data, checkpoints."""
