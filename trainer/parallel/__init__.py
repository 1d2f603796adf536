"""Strategies, BatchNorm over the global batch and its micro-batches, what saves memory."""
