"""Whether a step fits a device, and if not, what would.

A :class:`~trainer.planner.step_cost.StepCost` says what is in use at the peak; the device must also
hold its context and the allocator's waste. Memory grows with the images in memory at a time: the
largest number that fits is found by halving.
"""

import bisect
import dataclasses
from dataclasses import dataclass

from common.errors import ConfigError
from trainer.config import RunConfig
from trainer.planner.rates import Rates
from trainer.planner.step_cost import PARTS, StepCost, count_step
from trainer.planner.traffic import Cluster

_STEP = 8  # micro-batches are multiples of this, where they are larger


@dataclass(frozen=True, kw_only=True)
class Part:
    """Memory of one kind."""

    name: str
    bytes: float


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """A process's device at the peak of a step."""

    parts: tuple[Part, ...]
    """Counted; then what the allocator wastes, and the context."""
    limit: float
    """Bytes of the device for this process."""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.total <= self.limit


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What to change in a run that does not fit; 0 where nothing of the kind helps."""

    micro_batch: int
    """The largest ``--micro-batch`` that fits on the same GPUs."""
    gpus: int
    """The least number of GPUs, in all, on which it fits without."""
    activation_checkpointing: bool
    """Whether that setting makes it fit."""
    exact_passes: float
    """How many times a step's usual time the networks take in pieces, with exact BatchNorm."""


def memory(step_cost: StepCost, rates: Rates, processes: int) -> DeviceMemory:
    """Memory of a step; where the device is the CPU, ``processes`` of a node share its memory."""
    parts = [Part(name=name, bytes=float(step_cost.bytes[name])) for name in PARTS]
    parts += [
        Part(name="allocator", bytes=(rates.memory_factor - 1) * step_cost.peak),
        Part(name="context", bytes=rates.context_bytes),
    ]
    shared = processes if rates.device == "cpu" else 1
    return DeviceMemory(parts=tuple(parts), limit=rates.gpu.memory / shared)


def can_be_split(config: RunConfig, step_cost: StepCost) -> bool:
    """Whether ``--micro-batch`` goes with the strategy and the BatchNorm settings."""
    return config.strategy.name == "ddp" and all(norm.synchronised for norm in step_cost.norms)


def remedy(config: RunConfig, step_cost: StepCost, cluster: Cluster) -> Remedy:
    """What would fit, for a run that does not fit ``cluster``."""
    return Remedy(
        micro_batch=_largest_micro_batch(config, cluster) if can_be_split(config, step_cost) else 0,
        gpus=_least_gpus(config, cluster),
        activation_checkpointing=_fits_recomputed(config, cluster),
        exact_passes=step_cost.exact_passes,
    )


def _fits(config: RunConfig, world_size: int, cluster: Cluster) -> bool:
    """Whether a step fits so many GPUs of ``cluster``'s kind; one that cannot be made does not."""
    try:
        step_cost = count_step(config, world_size, cluster.rates.device)
    except ConfigError:  # an encoder without blocks to recompute, a BatchNorm of one value
        return False
    return memory(step_cost, cluster.rates, min(cluster.gpus, world_size)).fits


def _fits_recomputed(config: RunConfig, cluster: Cluster) -> bool:
    if config.activation_checkpointing:
        return False
    recomputed = dataclasses.replace(config, micro_batch=0, activation_checkpointing=True)
    return _fits(recomputed, cluster.world_size, cluster)


def _largest_micro_batch(config: RunConfig, cluster: Cluster) -> int:
    def is_too_much(images: int) -> bool:
        split = dataclasses.replace(config, activation_checkpointing=False, micro_batch=images)
        return not _fits(split, cluster.world_size, cluster)

    local_batch = config.batch // cluster.world_size
    pieces = [*range(1, _STEP), *range(_STEP, local_batch + 1, _STEP)]
    fitting = bisect.bisect_left(pieces, True, key=is_too_much)
    return pieces[fitting - 1] if fitting else 0


def _least_gpus(config: RunConfig, cluster: Cluster) -> int:
    """Whole nodes, or a part of one."""
    gpus, whole = cluster.gpus, dataclasses.replace(config, micro_batch=0)
    whole_nodes = range(gpus, config.batch + 1, gpus)
    sizes = [size for size in (*range(1, gpus), *whole_nodes) if config.batch % size == 0]
    found = bisect.bisect_left(sizes, True, key=lambda size: _fits(whole, size, cluster))
    return sizes[found] if found < len(sizes) else 0
