"""Whether a step fits a device, and if not, what would.

A :class:`~trainer.planner.step_cost.StepCost` says what is in use at the peak; the device must also
hold its context and the allocator's waste. Memory grows linearly with the images in memory at a
time, so two counts give the largest number that fits; that number is then counted itself.
"""

import dataclasses
from collections.abc import Callable
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
    measured = rates.calibration
    factor = measured.memory_factor if measured else rates.memory_factor
    base = measured.base_bytes if measured else rates.context_bytes
    parts = [Part(name=name, bytes=float(step_cost.bytes[name])) for name in PARTS]
    parts += [
        Part(name="allocator", bytes=(factor - 1) * step_cost.peak),
        Part(name="context", bytes=base),
    ]
    shared = processes if rates.device == "cpu" else 1
    return DeviceMemory(parts=tuple(parts), limit=rates.memory / shared)


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


def _needed(config: RunConfig, world_size: int, cluster: Cluster) -> DeviceMemory:
    """On so many GPUs of ``cluster``'s kind."""
    step_cost = count_step(config, world_size, cluster.rates.device)
    return memory(step_cost, cluster.rates, min(cluster.gpus, world_size))


def _largest_micro_batch(config: RunConfig, cluster: Cluster) -> int:
    def at(images: int) -> DeviceMemory:
        split = dataclasses.replace(config, activation_checkpointing=False, micro_batch=images)
        return _needed(split, cluster.world_size, cluster)

    guess = _rounded(_meets_limit(at, config.batch // cluster.world_size))
    while guess >= 1:
        if at(guess).fits:
            return guess
        guess = _rounded(min(guess - 1, int(guess * 0.97)))
    return 0


def _fits_recomputed(config: RunConfig, cluster: Cluster) -> bool:
    if config.activation_checkpointing:
        return False
    recomputed = dataclasses.replace(config, micro_batch=0, activation_checkpointing=True)
    try:
        return _needed(recomputed, cluster.world_size, cluster).fits
    except ConfigError:  # an encoder without blocks
        return False


def _least_gpus(config: RunConfig, cluster: Cluster) -> int:
    """Whole nodes, or a part of one."""
    gpus, whole = cluster.gpus, dataclasses.replace(config, micro_batch=0)

    def at(images: int) -> DeviceMemory:
        return _needed(dataclasses.replace(whole, batch=images * gpus), gpus, cluster)

    most = 1.05 * _meets_limit(at, config.batch)  # the loss bends the line a little
    for world_size in (*range(1, gpus), *range(gpus, config.batch + 1, gpus)):
        if config.batch % world_size or config.batch // world_size > most:
            continue
        if _needed(whole, world_size, cluster).fits:
            return world_size
    return 0


def _meets_limit(at: Callable[[int], DeviceMemory], most: int) -> int:
    """Images at which the straight line through two counts meets the limit, at most ``most``."""
    low, high = min(_STEP, most), min(8 * _STEP, most)
    if high == low:
        return most
    first, second = at(low), at(high)
    slope = (second.total - first.total) / (high - low)
    if slope <= 0:
        return most
    return min(most, int(low + (first.limit - first.total) / slope))


def _rounded(images: int) -> int:
    return images - images % _STEP if images > _STEP else max(0, images)
