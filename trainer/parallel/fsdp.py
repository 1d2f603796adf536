"""FSDP2: every process holds a share of each weight, gradient and optimizer state.

Weights are gathered block by block for a forward and a backward pass, gradients reduced to the
shares. Each is a DTensor, cut along its first dimension, with a plain tensor as this process's
piece. The optimizer works on the pieces: torch's fused kernels take no DTensors, and LARS adds up
the pieces' norms in one all-reduce instead of two for each layer.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.base import Objective
from trainer.optim.lars import LARS
from trainer.optim.optimizers import OptimConfig, ShardedOptimizer, build_optimizer
from trainer.optim.sharded_norms import local, total_norm, whole
from trainer.parallel.sharding import Sharding
from trainer.state.checkpoint import Tensors, optimizer_tensors, restore_optimizer, split_key


def fsdp_strategy(world_size: int, backend: str, compress: bool) -> ModelParallelStrategy:
    """Fabric's strategy for processes that all share out one copy.

    ``compress``: gradients are reduced in bfloat16.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compress else None)

    def share_out(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        shares = mesh["data_parallel"]
        for block in _blocks(module):
            fully_shard(block, mesh=shares, mp_policy=policy)
        fully_shard(module, mesh=shares, mp_policy=policy)
        return module

    return ModelParallelStrategy(
        share_out,
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        process_group_backend=backend,
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: blocks of a ResNet or transformer, or a sequence of layers."""
    for child in module.children():
        if _holds_blocks(child):
            yield from _blocks(child)
        elif isinstance(module, nn.Sequential | nn.ModuleList) or isinstance(child, nn.Sequential):
            if next(child.parameters(), None) is not None:
                yield child
        else:
            yield from _blocks(child)


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is a sequence of more than single layers; a list has no forward pass itself."""
    if isinstance(module, nn.ModuleList):
        return True
    elements = module.children()
    return isinstance(module, nn.Sequential) and any(any(e.children()) for e in elements)


class PieceOptimizer(ShardedOptimizer):
    """Over this process's pieces of a module, which is not moved or cast afterwards."""

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        self.params = {n: p for n, p in module.named_parameters() if isinstance(p, DTensor)}
        self.pieces = {
            name: nn.Parameter(local(param), param.requires_grad)
            for name, param in self.params.items()
        }
        first = next(iter(self.params.values()))
        self._holders: dist.ProcessGroup = first.device_mesh.get_group()
        self.named = _Named(self.pieces)
        super().__init__(build_optimizer(self.named, config))
        if isinstance(self.inner, LARS):
            self.inner.holders = self._holders

    def _step(self) -> None:
        for name, piece in self.pieces.items():
            grad = self.params[name].grad
            piece.grad = None if grad is None else local(grad)
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, the pieces' too."""
        self.inner.zero_grad(set_to_none)
        for param in self.params.values():
            param.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """That of all processes' pieces. A collective."""
        grads = [local(p.grad) for p in self.params.values() if p.grad is not None]
        return total_norm(grads, self._holders)


class _Named(nn.Module):
    """Parameters under the names that they have in a network, dots and all."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters.update(params)


def _as_shares(value: torch.Tensor, param: DTensor) -> torch.Tensor:
    if value.shape != local(param).shape:
        return value  # AdamW's count of steps
    return DTensor.from_local(
        value,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _piece_of(value: torch.Tensor, param: DTensor) -> torch.Tensor:
    if value.shape != param.shape:
        return value
    # No source rank: every process cuts its own copy, and nothing is sent.
    placed = value.to(param.device)
    return local(distribute_tensor(placed, param.device_mesh, param.placements, src_data_rank=None))


class FullySharded(Sharding):
    """Networks and optimizer under FSDP2."""

    optimizer: PieceOptimizer

    def __init__(
        self, fabric: Fabric, objective: Objective, encoder: EncoderConfig, optim: OptimConfig
    ) -> None:
        self._fabric, self._encoder_config = fabric, encoder
        # FSDP takes contiguous weights only; convolutions follow the layout of their input.
        self.objective = objective.to(fabric.device)
        self.model = fabric.setup_module(self.objective)
        self.optimizer = PieceOptimizer(self.objective, optim)

    def model_tensors(self) -> Tensors:
        """Gathered tensor by tensor, onto the CPU of rank 0."""
        return self._gathered(self.objective.state_dict())

    def optimizer_tensors(self) -> Tensors:
        """Likewise."""
        pieces = optimizer_tensors(self.optimizer.named, self.optimizer.inner)
        return self._gathered(
            {key: _as_shares(piece, self._param(key)) for key, piece in pieces.items()}
        )

    def restore_optimizer(self, saved: Tensors) -> None:
        """Every process cuts its pieces."""
        pieces = {key: _piece_of(value, self._param(key)) for key, value in saved.items()}
        restore_optimizer(self.optimizer.named, self.optimizer.inner, pieces)

    def _param(self, key: str) -> DTensor:
        return self.optimizer.params[split_key(key, self.optimizer.params)[0]]

    def whole_encoder(self) -> nn.Module:
        """A copy: processes evaluate different numbers of batches, and every one would gather."""
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(self._encoder_config).to(self._fabric.device)
        tensors = self.objective.encoder.state_dict()
        # Assigned, not copied: in float64 they stay so.
        encoder.load_state_dict(
            {name: whole(value) for name, value in tensors.items()}, assign=True
        )
        return encoder.to(memory_format=torch.channels_last)

    def _gathered(self, tensors: Tensors) -> Tensors:
        """Whole tensors on the CPU of rank 0, one at a time on the device."""
        gathered: Tensors = {}
        for name, value in tensors.items():
            entire = whole(value)
            if self._fabric.is_global_zero:
                gathered[name] = entire.detach().cpu()
        return gathered
