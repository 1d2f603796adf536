"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks are computed twice.

A block of the encoder keeps its input alone and runs again when the backward pass comes to it. Its
BatchNorm layers are given the statistics of the first time: no second collective, and running
statistics that follow a batch once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigError
from trainer.parallel.sync_batch_norm import (
    Statistics,
    SyncBatchNorm,
    convert_sync_batch_norm,
    normalise,
    normalised_by,
)


def checkpoint_blocks(encoder: nn.Module) -> int:
    """Make the encoder's blocks keep their inputs only. In place; names and weights stay.

    A block is an outermost element of an ``nn.Sequential`` or ``nn.ModuleList`` that has at least
    two layers with weights of two and more dimensions: a ResNet's residual block, a transformer's
    layer.

    Args:
        encoder: BatchNorm layers that are not synchronised yet become ones of a single process.

    Returns:
        How many blocks there are.

    Raises:
        ConfigError: none.
    """
    convert_sync_batch_norm(encoder, group_size=1, keep_synchronised=True)
    blocks = list(_blocks(encoder))
    if not blocks:
        raise ConfigError(
            "--activation-checkpointing: this encoder has no blocks (elements of an nn.Sequential "
            "with two layers or more); set --no-activation-checkpointing"
        )
    for block in blocks:
        _checkpoint(block)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and _weighted_layers(child) > 1:
            yield child
        else:
            yield from _blocks(child)


def _weighted_layers(module: nn.Module) -> int:
    return sum(
        any(p.ndim > 1 for p in layer.parameters(recurse=False)) for layer in module.modules()
    )


def _checkpoint(block: nn.Module) -> None:
    compute: Callable[..., Any] = block.forward
    layers = [m for m in block.modules() if isinstance(m, SyncBatchNorm)]

    def forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*args)
        recorded: list[Statistics] = []  # in the order of the layers' calls
        again = iter(recorded)

        def record(layer: SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
            recorded.append(layer.statistics(x))
            return normalise(layer, x, recorded[-1])

        def replay(layer: SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
            return normalise(layer, x, next(again))

        return checkpoint(
            compute,
            *args,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=lambda: (normalised_by(layers, record), normalised_by(layers, replay)),
        )

    block.forward = forward
