"""The networks of a run as they train: weights, BatchNorm, and what saves memory and time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from trainer.config import RunConfig
from trainer.models.encoders import Encoder, build_encoder
from trainer.models.init_from import start_from
from trainer.models.timm_encoder import is_timms
from trainer.objectives.base import IMAGENET_SAMPLES, Given, Objective
from trainer.parallel.activation_checkpoint import checkpoint_blocks
from trainer.parallel.sync_batch_norm import (
    SyncBatchNorm,
    convert_sync_batch_norm,
    is_plain_batch_norm,
)

_SHOWN = 4  # names in a message


def training_objective(
    config: RunConfig,
    world_size: int,
    init_from: Path | None,
    num_samples: int,
    num_classes: int = 1000,
) -> Objective:
    """Networks as they train on ``world_size`` processes; see :func:`build_objective`.

    Raises:
        ConfigError: settings contradict each other or the networks.
    """
    objective = build_objective(config, init_from, num_samples, num_classes)
    if is_timms(config.encoder.name) or ":" in config.encoder.name:
        _refuse_own_norms(objective.encoder, config)
        _refuse_idle_weights(objective.encoder, config)
    # On one process too, for the same rounding; bf16's own is coarser than what that would save.
    if world_size > 1 or config.precision != "bf16" or config.micro_batch:
        synchronise_batch_norm(objective, config.sync_batch_norm, config.batch_norm_group)
    if config.micro_batch:
        refuse_own_statistics(objective)
    # These change neither weights nor their names.
    if config.activation_checkpointing:
        checkpoint_blocks(objective.encoder)
    if config.compile:
        objective.encoder.compile()
    return objective


def build_objective(
    config: RunConfig,
    init_from: Path | None = None,
    num_samples: int = IMAGENET_SAMPLES,
    num_classes: int = 1000,
) -> Objective:
    """Networks with the initial weights that the seed decides, on any world size.

    The encoder has those of the file ``init_from`` instead, if there is one; key encoders with it.
    ``num_samples`` and ``num_classes``, of the data set, are for objectives that keep something of
    every sample, or learn from labels.
    """
    torch.manual_seed(config.seed)
    encoder = build_encoder(config.encoder)
    if init_from is not None:
        start_from(encoder, init_from)
    normalisation = config.augment.normalisation()
    given = Given(config.seed, num_samples, num_classes, config.crop.size, *normalisation)
    return config.objective.build(encoder, config.head, given)


def synchronise_batch_norm(
    objective: Objective, sync_batch_norm: bool, group_size: int = 0
) -> None:
    """Convert those parts of an objective whose statistics are to be the global batch's."""
    parts = objective.synchronised_parts(sync_batch_norm)
    convert_sync_batch_norm(nn.ModuleList(parts), group_size)


def refuse_own_statistics(objective: Objective) -> None:
    """Refuse a batch in pieces where a BatchNorm is not synchronised.

    Raises:
        ConfigError: names the layer and what to set.
    """
    for name, module in objective.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            raise ConfigError(
                f"--micro-batch: {name} would normalise every piece on its own, another batch than "
                "the one asked for; set --sync-batch-norm, and --objective.key-batch-norm sync for "
                "MoCo"
            )


def _refuse_own_norms(encoder: Encoder, config: RunConfig) -> None:
    """Refuse on one process what several could not do."""
    for name, module in encoder.named_modules() if config.sync_batch_norm else ():
        if isinstance(module, _BatchNorm) and not is_plain_batch_norm(module):
            raise ConfigError(
                f"--encoder.name {config.encoder.name}: its {name} is a {type(module).__name__},"
                " which does more than a BatchNorm and cannot be synchronised; take another"
                " encoder, or --no-sync-batch-norm"
            )


def _refuse_idle_weights(encoder: Encoder, config: RunConfig) -> None:
    """Refuse a module with weights that no gradient reaches.

    One process and FSDP would leave them as they are; DDP waits for every gradient, and ends.

    Raises:
        ConfigError: names them; or the module fails on images of the run's size.
    """
    name, side = config.encoder.name, config.crop.size
    weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):  # dropout
            features_NF = functional_call(encoder, buffers, (torch.zeros(2, 3, side, side),))
    except Exception as error:  # whatever the user's module does
        raise ConfigError(
            f"--encoder.name: {name} fails on images of --crop.size {side}"
            f" ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    gradients: Sequence[torch.Tensor | None] = [None] * len(weights)
    if features_NF.requires_grad:
        gradients = torch.autograd.grad(
            features_NF.sum(), list(weights.values()), allow_unused=True
        )
    idle = [weight for weight, gradient in zip(weights, gradients) if gradient is None]
    if idle:
        more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        raise ConfigError(
            f"--encoder.name: in {name} no gradient reaches {', '.join(idle[:_SHOWN])}{more}; leave"
            " them out of the module, or call requires_grad_(False) on them"
        )
