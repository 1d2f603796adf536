"""Optimizers, LARS, and the learning rate of every step."""
