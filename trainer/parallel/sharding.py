"""Where weights, gradients and optimizer state lie, and how a checkpoint gets them whole.

:class:`Sharding` is DDP's and one process's; :mod:`trainer.parallel.fsdp` and
:mod:`trainer.parallel.zero` have others. A checkpoint holds whole tensors by parameters' names,
whichever wrote it.
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.objectives.base import Objective
from trainer.optim.optimizers import OptimConfig, Updatable, build_optimizer
from trainer.state.checkpoint import Tensors, optimizer_tensors, restore_optimizer


class Sharding:
    """Networks and optimizer as a strategy lays them out: here every process holds everything.

    All methods are collectives.
    """

    model: _FabricModule
    """The objective as Fabric wraps it: autocast, and gradients averaged over processes."""
    optimizer: Updatable
    """What moves the parameters."""

    def __init__(
        self, fabric: Fabric, objective: Objective, optim: OptimConfig, compress: bool = False
    ) -> None:
        self.objective = objective.to(memory_format=torch.channels_last)
        self.model = fabric.setup_module(self.objective)
        wrapped = self.model._forward_module
        if compress and isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, bf16_compress_hook)
        self.optimizer = self._whole = build_optimizer(self.objective, optim)

    def model_tensors(self) -> Tensors:
        """The objective's ``state_dict`` in whole tensors; nothing on ranks that write none."""
        return dict(self.objective.state_dict())

    def optimizer_tensors(self) -> Tensors:
        """Optimizer state, ``parameter::slot``, whole; nothing on ranks that write none."""
        return optimizer_tensors(self.objective, self._whole)

    def restore_optimizer(self, saved: Tensors) -> None:
        """Put :meth:`optimizer_tensors` back; every rank has all of them.

        Raises:
            CheckpointError: a name in ``saved`` is no parameter.
        """
        restore_optimizer(self.objective, self._whole, saved)

    def whole_encoder(self) -> nn.Module:
        """The encoder with all its weights on this device, to be evaluated."""
        return self.objective.encoder
