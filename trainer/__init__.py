"""The trainer: objectives, encoders, the distributed step, checkpoints and evaluation."""
