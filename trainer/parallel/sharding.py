"""Where weights, gradients and optimizer state lie, and how a checkpoint gets them whole.

:class:`Replicated` is DDP's and one process's. The others are :mod:`trainer.parallel.fsdp` and
:mod:`trainer.parallel.zero`. A checkpoint holds whole tensors by parameters' names, whichever wrote
it.
"""

from typing import Protocol

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.models.encoders import EncoderConfig
from trainer.objectives.base import Objective
from trainer.optim.optimizers import OptimConfig, Updatable, build_optimizer
from trainer.parallel.strategy import StrategyConfig
from trainer.state.checkpoint import Tensors, optimizer_tensors, restore_optimizer


class Sharding(Protocol):
    """Networks and optimizer as a strategy lays them out. Every method is a collective."""

    @property
    def model(self) -> nn.Module:
        """The objective as Fabric wraps it: autocast, and gradients averaged over processes."""

    @property
    def optimizer(self) -> Updatable:
        """What moves the parameters."""

    def model_tensors(self) -> Tensors:
        """The objective's ``state_dict`` in whole tensors; nothing on ranks that write none."""

    def optimizer_tensors(self) -> Tensors:
        """Optimizer state, ``parameter::slot``, whole; nothing on ranks that write none."""

    def restore_optimizer(self, saved: Tensors) -> None:
        """Put :meth:`optimizer_tensors` back; every rank has all of them.

        Raises:
            CheckpointError: a name in ``saved`` is no parameter.
        """

    def whole_encoder(self) -> nn.Module:
        """The encoder with all its weights on this device, to be evaluated."""


class Replicated:
    """Every process holds everything: DDP, and one process."""

    def __init__(
        self, fabric: Fabric, objective: Objective, optim: OptimConfig, compress: bool = False
    ) -> None:
        self._objective = objective.to(memory_format=torch.channels_last)
        self.model = fabric.setup_module(self._objective)
        wrapped = self.model._forward_module
        if compress and isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, bf16_compress_hook)
        self.optimizer = build_optimizer(self._objective, optim)

    def model_tensors(self) -> Tensors:
        """See :class:`Sharding`."""
        return dict(self._objective.state_dict())

    def optimizer_tensors(self) -> Tensors:
        """See :class:`Sharding`."""
        return optimizer_tensors(self._objective, self.optimizer)

    def restore_optimizer(self, saved: Tensors) -> None:
        """See :class:`Sharding`."""
        restore_optimizer(self._objective, self.optimizer, saved)

    def whole_encoder(self) -> nn.Module:
        """See :class:`Sharding`."""
        return self._objective.encoder


def lay_out(
    config: StrategyConfig,
    fabric: Fabric,
    objective: Objective,
    encoder: EncoderConfig,
    optim: OptimConfig,
) -> Sharding:
    """Wrap ``objective`` and build its optimizer.

    Args:
        config: the strategy that ``fabric`` was launched with.
        fabric: launched.
        objective: networks, the same on all processes.
        encoder: of the objective's encoder.
        optim: the optimizer's settings.

    Raises:
        ConfigError: there is nothing to train.
    """
    if config.name == "ddp" or fabric.world_size == 1:
        return Replicated(fabric, objective, optim, config.compress_gradients == "bf16")
    if config.name == "fsdp":
        from trainer.parallel.fsdp import FullySharded

        return FullySharded(fabric, objective, encoder, optim)
    from trainer.parallel.zero import ZeroSharded

    return ZeroSharded(fabric, objective, optim)
