"""What one step of a run allocates and computes, counted on tensors without data.

The real networks run forward and backward on torch's fake tensors: shapes, dtypes, layouts and
lifetimes are those of a real step, memory and time are not taken. A dispatch mode sees every
operation, adds up the storages that are alive, each once, and notes FLOPs and bytes. So what
autograd keeps for backward, what autocast copies and what backward itself needs are all in the
peak, and no formula per layer is.

Fake tensors say that they are on the CPU, whatever will train: autograd cannot run backward on
fake CUDA tensors where there is no GPU. Autocast's rules are then the CPU's; they are CUDA's for
convolutions, linear layers and BatchNorm, and keep LayerNorm and softmax in bfloat16 where CUDA
takes float32.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError, first_sentence
from trainer.config import RunConfig
from trainer.objectives.base import Inputs, Objective, Outputs
from trainer.objectives.moco import MoCoConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.parallel.activation_checkpoint import checkpoint_blocks
from trainer.parallel.networks import build_objective
from trainer.parallel.sync_batch_norm import SyncBatchNorm
from trainer.planner.ledger import Ledger, Operation
from trainer.planner.loss_cost import contrast
from trainer.planner.sharded_state import Shares
from trainer.run import COMPUTE_DTYPE

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "buffers",
    "crops",
    "views",
    "activations",
    "loss",
    "temporaries",
)
"""What memory is told apart by; :class:`StepCost` has them all."""


@dataclass(frozen=True)
class Norm:
    """A BatchNorm layer's call in a step."""

    channels: int
    backward: bool
    """Whether gradients go through it: not so in a key encoder."""


@dataclass(frozen=True)
class StepCost:
    """One process's step: memory at its peak, and work."""

    images: int
    """Images that are in memory at a time."""
    bytes: Mapping[str, int]
    """Of each of :data:`PARTS`, at the moment of the peak."""
    saved: int
    """Bytes that are alive for the backward pass when the forward pass has ended."""
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    norms: tuple[Norm, ...]
    parameters: int
    """Number of values in all networks, key encoder included."""
    trainable: int
    """Number of values that the optimizer moves, and gradients are averaged of."""

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes.values())

    @property
    def flops(self) -> float:
        """Of forward and backward pass."""
        return sum(each.flops for each in (*self.forward, *self.backward))


def count_step(
    config: RunConfig, images: int, *, local_batch: int, world_size: int, device: str = "cuda"
) -> StepCost:
    """Count one process's step.

    Args:
        config: the run.
        images: in memory at a time: the local batch, or a micro-batch of it.
        local_batch: images of the process in a step.
        world_size: processes; more than one keep gradients in DDP's buckets, whole and for ever.
        device: "cuda" or "cpu", for what depends on it: prefetched crops, copies while augmenting
            and updating, the loss's tiles.

    Raises:
        ConfigError: the networks do not run without data.
    """
    ledger = Ledger()
    with torch.device("meta"):
        objective = build_objective(config)
    if config.precision == "fp64":
        objective = objective.double()
    objective = objective.to(memory_format=torch.channels_last)
    if config.activation_checkpointing:
        checkpoint_blocks(objective.encoder)
        _normalise_alone(objective)
    norms: list[Norm] = []
    _watch_norms(objective, norms)
    values = list(objective.parameters())
    trainable = sum(p.numel() for p in values if p.requires_grad)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            forward = _step(config, objective, ledger, images, local_batch, world_size, device)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's module does
        raise ConfigError(
            f"--encoder.name: {config.encoder.name} cannot be counted without data at"
            f" {config.crop.size} pixels ({type(error).__name__}: {first_sentence(error)}); its"
            " forward pass must not look at values"
        ) from error
    return StepCost(
        images=images,
        bytes={part: ledger.at_peak[part] for part in PARTS},
        saved=forward.saved,
        forward=tuple(ledger.operations[forward.first : forward.last]),
        backward=tuple(ledger.operations[forward.last :]),
        norms=tuple(norms),
        parameters=sum(p.numel() for p in values),
        trainable=trainable,
    )


@dataclass
class _Forward:
    """Places in the list of operations, and what was alive in between."""

    first: int
    last: int
    saved: int


def _step(
    config: RunConfig,
    objective: Objective,
    ledger: Ledger,
    images: int,
    local_batch: int,
    world_size: int,
    device: str,
) -> _Forward:
    _give_storage(objective, ledger)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    size = sum(p.numel() * p.itemsize for p in trainable)
    share = Shares(config, objective, size, world_size)
    ledger.hold("parameters", share.parameters - size)
    ledger.hold("optimizer", share.optimizer)
    ledger.hold("buffers", share.gathered)
    if world_size > 1:
        ledger.hold("gradients", share.gradients)  # DDP's are views of its buckets: no second copy
    for param in trainable:
        param.register_post_accumulate_grad_hook(_keeper(ledger, bucketed=world_size > 1))
    views, side = Objective.views, config.crop.size
    ledger.hold("crops", _batches_held(config, device) * local_batch * views * side * side * 3)
    images_VNCHW = _views(config, ledger, views * images, device).unflatten(0, (views, -1))
    first = len(ledger.operations)
    with ledger.phase("activations"), _autocast(config):
        outputs: Outputs = objective(Inputs((images_VNCHW,)))
    last, saved = len(ledger.operations), ledger.live["activations"]
    loss = contrast(config, local_batch, world_size, device).bytes
    if images < local_batch:  # all pieces' outputs, joined, and the derivative by them
        kept = sum(each.nbytes for each in (*outputs.rows.values(), *outputs.fixed.values()))
        ledger.hold("loss", 4 * kept * local_batch // images)
    ledger.hold("loss", loss)
    with ledger.phase("temporaries"):
        rows = list(outputs.rows.values())
        torch.autograd.backward(rows, [torch.empty_like(each) for each in rows])
        del rows
    ledger.release("loss", loss)
    del images_VNCHW, outputs
    copies = _update_bytes(config, objective, size, device)
    ledger.hold("temporaries", copies)
    ledger.release("temporaries", copies)
    return _Forward(first, last, saved)


def _give_storage(objective: nn.Module, ledger: Ledger) -> None:
    """Replace meta tensors by fake ones, in place; ``Module.to`` cannot."""
    made: dict[int, Any] = {}
    for module in objective.modules():
        with ledger.phase("parameters"):
            for name, param in module._parameters.items():
                if param is not None:
                    if id(param) not in made:
                        fake = _like(param)
                        made[id(param)] = nn.Parameter(fake, requires_grad=param.requires_grad)
                    module._parameters[name] = made[id(param)]
        with ledger.phase("buffers"):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _like(buffer)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _keeper(ledger: Ledger, *, bucketed: bool) -> Callable[[torch.Tensor], None]:
    def keep(param: torch.Tensor) -> None:
        if bucketed:
            param.grad = None
        elif param.grad is not None:
            ledger.move(param.grad, "gradients")

    return keep


def _views(config: RunConfig, ledger: Ledger, rows: int, device: str) -> torch.Tensor:
    shape, dtype = (rows, 3, config.crop.size, config.crop.size), COMPUTE_DTYPE[config.precision]
    with ledger.phase("views"):
        # On the CPU views are made in float32 and then rounded.
        made = torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype
        x = torch.empty(shape, dtype=made, device="cpu", memory_format=torch.channels_last)
        return x.to(dtype)


def _autocast(config: RunConfig) -> Any:
    if config.precision != "bf16":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _batches_held(config: RunConfig, device: str) -> int:
    """Batches of crops on the training device: the one in use, and those that were read ahead."""
    return 2 if device == "cuda" else config.loader.prefetch + 2


def _update_bytes(config: RunConfig, objective: nn.Module, size: int, device: str) -> int:
    """What optimizer and moving averages copy while they work."""
    keys = sum(p.numel() * p.itemsize for p in objective.parameters() if not p.requires_grad)
    # LARS on the CPU makes its updates beside the gradients; kernels on a GPU do not.
    return max(keys, size if config.optim.name == "lars" and device == "cpu" else 0)


def _normalise_alone(objective: nn.Module) -> None:
    """Let synchronised BatchNorm be torch's own: ours looks at counts, which are data."""
    for module in objective.modules():
        if isinstance(module, SyncBatchNorm):
            module.forward = partial(_BatchNorm.forward, module)


def _watch_norms(objective: nn.Module, calls: list[Norm]) -> None:
    def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        assert isinstance(module, _BatchNorm)  # noqa: S101 - for the type checker
        if torch._C._current_graph_task_id() == -1:  # not when computed again in backward
            calls.append(Norm(module.num_features, output.requires_grad))

    for module in objective.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(note)


def synchronised(config: RunConfig, norms: tuple[Norm, ...]) -> tuple[Norm, ...]:
    """The BatchNorm calls whose statistics cross processes: by the settings of both encoders."""
    if isinstance(config.objective, SimCLRConfig) or not isinstance(config.objective, MoCoConfig):
        return norms if config.sync_batch_norm else ()
    keys = config.objective.key_batch_norm == "sync"
    return tuple(n for n in norms if (config.sync_batch_norm if n.backward else keys))
