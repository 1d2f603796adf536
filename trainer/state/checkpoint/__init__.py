"""Checkpoints: atomic, checksummed, written behind the steps, resumable at any world size.

Layout of ``RUN/checkpoints``::

    step-00000040/model.safetensors       parameters and buffers, by name
                  optimizer.safetensors   "parameter name::slot", e.g. momentum buffers
                  state.json              step, data fingerprint, counters: everything else
                  manifest.json           SHA-256, size and tensors of each file; written last
    latest.json, best.json                {"step": 40}; replaced atomically

A checkpoint is written under a temporary name in the same directory, flushed to disk, and renamed:
it exists completely or not at all. Reading checks every file against the manifest and falls back to
the checkpoint before. One rank writes whole tensors, so nothing in a file depends on the number of
ranks, nor on the strategy that shares tensors out between them.

:mod:`~trainer.state.checkpoint.files` writes and checks single files,
:mod:`~trainer.state.checkpoint.store` keeps a run's checkpoints,
:mod:`~trainer.state.checkpoint.saver` saves them while training goes on,
:mod:`~trainer.state.checkpoint.contents` turns a model and its optimizer into tensors and back.
"""

from trainer.state.checkpoint.contents import (
    load_encoder_state,
    load_model_state,
    optimizer_tensors,
    restore_optimizer,
    split_key,
)
from trainer.state.checkpoint.files import Tensors
from trainer.state.checkpoint.saver import CheckpointConfig, CheckpointSaver
from trainer.state.checkpoint.store import Checkpoint, CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointSaver",
    "CheckpointStore",
    "Tensors",
    "load_encoder_state",
    "load_model_state",
    "optimizer_tensors",
    "restore_optimizer",
    "split_key",
]
