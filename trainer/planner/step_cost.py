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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError, first_sentence
from trainer.config import RunConfig
from trainer.objectives.base import IMAGENET_SAMPLES, Inputs, Objective, Outputs, blank_inputs
from trainer.parallel.activation_checkpoint import checkpoint_blocks
from trainer.parallel.networks import build_objective
from trainer.parallel.sync_batch_norm import SyncBatchNorm
from trainer.planner.ledger import Ledger, Operation
from trainer.planner.loss_cost import loss_bytes, loss_costs
from trainer.run import COMPUTE_DTYPE

_ZERO_BUCKETS = 2 * 2**25  # two of 32 MiB, in which gradients travel

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
    synchronised: bool
    """Whether its statistics are those of several processes."""


@dataclass(frozen=True)
class StepCost:
    """One process's step: memory at its peak, and work."""

    images: int
    """Images that are in memory at a time."""
    num_samples: int
    """Of the data set."""
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

    @property
    def exact_passes(self) -> float:
        """How many times a step's usual time the networks take in pieces, with exact BatchNorm."""
        # L/2 + 3/2 L + 3 forward passes in place of 3: see trainer.parallel.micro_batch_norm.
        return (2 * len(self.norms) + 3) / 3


def count_step(
    config: RunConfig,
    world_size: int,
    device: str = "cuda",
    num_samples: int = IMAGENET_SAMPLES,
) -> StepCost:
    """Count one process's step, in pieces where the settings say so.

    Args:
        config: the run, whose batch divides by the processes.
        world_size: processes; more than one keep gradients in DDP's buckets, whole and for ever.
        device: "cuda" or "cpu", for what depends on it: prefetched crops, copies while augmenting
            and updating, the loss's tiles.
        num_samples: of the data set, for objectives that keep something of each.

    Raises:
        ConfigError: the networks do not run without data.
    """
    ledger = Ledger()
    with torch.device("meta"):
        objective = build_objective(config, num_samples=num_samples)
    if config.precision == "fp64":
        objective = objective.double()
    objective = objective.to(memory_format=torch.channels_last)
    if config.activation_checkpointing:
        checkpoint_blocks(objective.encoder)
        _normalise_alone(objective)
    norms = _watched_norms(objective, config.sync_batch_norm)
    values = list(objective.parameters())
    local_batch = config.batch // world_size
    images = min(config.micro_batch or local_batch, local_batch)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            _hold_state(config, objective, ledger, world_size)
            inputs = _inputs(config, ledger, local_batch, images, device)
            first = len(ledger.operations)
            with (
                ledger.phase("activations"),
                torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
            ):
                outputs: Outputs = objective(inputs)
            last, saved = len(ledger.operations), ledger.live["activations"]
            _backward(config, ledger, outputs, images, world_size, device, num_samples)
            del inputs, outputs
            ledger.hold("temporaries", _update_bytes(config, objective))
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
        num_samples=num_samples,
        bytes={part: ledger.at_peak[part] for part in PARTS},
        saved=saved,
        forward=tuple(ledger.operations[first:last]),
        backward=tuple(ledger.operations[last:]),
        norms=tuple(norms),
        parameters=sum(p.numel() for p in values),
        trainable=sum(p.numel() for p in values if p.requires_grad),
    )


def _hold_state(config: RunConfig, objective: Objective, ledger: Ledger, world_size: int) -> None:
    """Weights, gradients and optimizer state, as much of them as the strategy leaves a process."""
    objective.to_empty(device="cpu")  # from meta tensors to fake ones
    for buffer in objective.buffers():
        ledger.move(buffer, "buffers")
    size = _trainable_bytes(objective)
    strategy = config.strategy.name if world_size > 1 else "ddp"
    part = size // world_size
    if strategy == "fsdp":
        ledger.hold("parameters", part - size)
        # Gathered: the block at work, and the next one on its way.
        ledger.hold("buffers", 2 * max(map(_trainable_bytes, objective.encoder.children())))
    ledger.hold("optimizer", optimizer_copies(config) * (size if strategy == "ddp" else part))
    if strategy.startswith("deepspeed"):
        ledger.hold("optimizer", part)  # ZeRO updates a copy of its part of the weights
        ledger.hold("buffers", _ZERO_BUCKETS)
    if world_size > 1:  # DDP's are views of its buckets: no second copy
        ledger.hold("gradients", part if strategy in ("fsdp", "deepspeed-2") else size)

    def keep(param: torch.Tensor) -> None:
        if world_size > 1:
            param.grad = None
        elif param.grad is not None:
            ledger.move(param.grad, "gradients")

    for param in objective.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(keep)


def optimizer_copies(config: RunConfig) -> int:
    """How many values the optimizer keeps for each that it moves."""
    if config.optim.name == "adamw":
        return 2
    return 1 if config.optim.momentum else 0


def _trainable_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def _backward(
    config: RunConfig,
    ledger: Ledger,
    outputs: Outputs,
    images: int,
    world_size: int,
    device: str,
    num_samples: int,
) -> None:
    """The backward pass from the outputs' rows, beside what the loss keeps."""
    local_batch = config.batch // world_size
    costs = loss_costs(config, local_batch, world_size, num_samples)
    loss = sum(loss_bytes(config, cost, device) for cost in costs)
    rows = list(outputs.rows.values())
    if images < local_batch:  # all pieces' outputs, joined, and the derivative by them
        kept = sum(each.nbytes for each in (*rows, *outputs.fixed.values()))
        ledger.hold("loss", 4 * kept * local_batch // images)
    ledger.hold("loss", loss)
    with ledger.phase("temporaries"):
        torch.autograd.backward(rows, [torch.empty_like(each) for each in rows])
    ledger.hold("loss", -loss)


def _inputs(
    config: RunConfig, ledger: Ledger, local_batch: int, images: int, device: str
) -> Inputs:
    """Views of ``images`` images, beside the crops of whole batches."""
    views, dtype = config.view_plan(), COMPUTE_DTYPE[config.precision]
    # On the training device: the batch in use, and those that were read ahead.
    batches = 2 if device == "cuda" else config.loader.prefetch + 2
    ledger.hold("crops", batches * local_batch * 3 * sum(group.pixels for group in views))
    with ledger.phase("views"):
        # On the CPU views are made in float32 and then rounded.
        made = torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype
        inputs = blank_inputs(views, images, made)
        return inputs._replace(views=tuple(each.to(dtype) for each in inputs.views))


def _update_bytes(config: RunConfig, objective: nn.Module) -> int:
    """What optimizer and moving averages copy while they work."""
    keys = sum(p.nbytes for p in objective.parameters() if not p.requires_grad)
    beside = config.optim.name == "lars"  # which makes its updates beside the gradients
    return max(keys, _trainable_bytes(objective) if beside else 0)


def _normalise_alone(objective: nn.Module) -> None:
    """Let synchronised BatchNorm be torch's own: ours looks at counts, which are data."""
    for module in objective.modules():
        if isinstance(module, SyncBatchNorm):
            module.forward = partial(_BatchNorm.forward, module)


def _watched_norms(objective: Objective, sync_batch_norm: bool) -> list[Norm]:
    """A list of the objective's BatchNorm calls, which its forward pass fills."""
    calls: list[Norm] = []
    parts = objective.synchronised_parts(sync_batch_norm)
    synchronised = {layer for part in parts for layer in part.modules()}

    def note(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        assert isinstance(module, _BatchNorm)  # noqa: S101 - for the type checker
        if torch._C._current_graph_task_id() == -1:  # not when computed again in backward
            calls.append(Norm(module.num_features, output.requires_grad, module in synchronised))

    for module in objective.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(note)
    return calls
