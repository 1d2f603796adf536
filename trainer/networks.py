"""The networks of a run as they train: weights, BatchNorm, and what saves memory and time."""

from pathlib import Path

import torch
from torch import nn

from trainer.activation_checkpoint import checkpoint_blocks
from trainer.config import RunConfig
from trainer.encoders import build_encoder
from trainer.errors import ConfigError
from trainer.gradients import refuse_own_statistics
from trainer.heads import build_head
from trainer.initial_weights import start_from
from trainer.objectives.base import Objective
from trainer.objectives.build import make_objective
from trainer.sync_batch_norm import convert_sync_batch_norm


def training_objective(config: RunConfig, world_size: int, init_from: Path | None) -> Objective:
    """Networks as they train on ``world_size`` processes; see :func:`build_objective`.

    Raises:
        ConfigError: settings contradict each other or the networks.
    """
    objective = build_objective(config, init_from)
    # On one process too, for the same rounding; bf16's own is coarser than what that would save.
    if world_size > 1 or config.precision != "bf16" or config.micro_batch:
        synchronise_batch_norm(objective, config.sync_batch_norm, config.batch_norm_group)
    if config.micro_batch:
        refuse_own_statistics(objective)
    _save_memory_and_time(config, objective)
    return objective


def build_objective(config: RunConfig, init_from: Path | None = None) -> Objective:
    """Networks with the initial weights that the seed decides, on any world size.

    Args:
        config: the run.
        init_from: file whose weights the encoder has instead, and key encoders with it.
    """
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder)
    if init_from is not None:
        start_from(encoder, init_from)
    head = build_head(config.head, encoder.feature_dim)
    return make_objective(encoder, head, config.objective, config.seed)


def synchronise_batch_norm(
    objective: Objective, sync_batch_norm: bool, group_size: int = 0
) -> None:
    """Convert those parts of an objective whose statistics are to be the global batch's."""
    parts = objective.synchronised_parts(sync_batch_norm)
    convert_sync_batch_norm(nn.ModuleList(parts), group_size)


def _save_memory_and_time(config: RunConfig, objective: Objective) -> None:
    """Activation checkpointing and torch.compile, which change neither weights nor their names."""
    if config.activation_checkpointing:
        if config.micro_batch:
            raise ConfigError(
                "--activation-checkpointing does not go with --micro-batch, which bounds the "
                "memory by itself; set one of them"
            )
        checkpoint_blocks(objective.encoder)
    if config.compile:
        objective.encoder.compile()
