"""How long a step takes, and what it waits for.

A GPU's operations take the longer of their FLOPs and their bytes at the attained rates, and
together no less than the host needs to start them. Gradients travel beside the backward pass; all
other collectives are waited for. The loader works beside everything, on other cores.

A machine that was calibrated has its own seconds instead. On the CPU decoding takes the cores that
train: it is in the measured step, and not beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.augment.plan import bytes_moved
from trainer.config import RunConfig
from trainer.objectives.base import Objective
from trainer.planner.ledger import Operation
from trainer.planner.loss_cost import contrast
from trainer.planner.rates import Rates
from trainer.planner.step_cost import StepCost
from trainer.planner.traffic import Flow

_UPDATE_BYTES = {"lars": 28, "sgd": 24, "adamw": 32}  # a parameter, with the gradient's norm
_AVERAGE_BYTES = 20  # a parameter of the key encoder: the average, and the copy for a skipped step
_WIDTH = {"bf16": 1.0, "fp32": 0.5, "fp64": 1 / 16}  # of the bf16 peak; fp32 as TF32
_POWERS = 16 * 1.8e9 * 130 / 989e12  # exponentials for each FLOP of the peak, as on an H100


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by part."""

    loader: float
    """Of the loader's cores for a step's images; beside all else."""
    augment: float
    forward: float
    backward: float
    loss: float
    update: float
    network: float
    """Collectives that are waited for."""
    hidden: float
    """Collectives beside the backward pass."""
    passes: float
    """Forward and backward pass take so many times their usual time: batches in pieces."""

    @property
    def compute(self) -> float:
        """Networks, loss and update."""
        return self.passes * (self.forward + self.backward) + self.loss + self.update

    @property
    def exposed(self) -> float:
        """All communication that nothing hides."""
        return self.network + max(0.0, self.hidden - self.backward)

    @property
    def device(self) -> float:
        """All that the device does or waits for, but images."""
        return self.augment + self.compute + self.exposed

    @property
    def seconds(self) -> float:
        """A step."""
        return max(self.loader, self.device)

    @property
    def bottleneck(self) -> str:
        """What to make faster first: loader, augmentation, compute or network."""
        if self.loader > self.device:
            return "loader"
        parts = {
            "augmentation": self.augment,
            "compute": self.compute,
            "network": self.exposed,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(
    config: RunConfig,
    step_cost: StepCost,
    local_batch: int,
    nodes: int,
    gpus: int,
    found: Iterable[Flow],
    rates: Rates,
    loader_rate: float,
) -> StepTime:
    """Predict a step.

    Args:
        config: the run.
        step_cost: of ``step_cost.images`` images in memory at a time.
        local_batch: images of a process.
        nodes: machines.
        gpus: processes on each; where the device is the CPU they share its cores.
        found: what travels.
        rates: stated or measured.
        loader_rate: images a core reads in a second.
    """
    sweeps, passes = _in_pieces(config, step_cost, local_batch)
    loss = contrast(config, local_batch, nodes * gpus, rates.device)
    network = sum(flow.seconds for flow in found if not flow.overlapped)
    hidden = sum(flow.seconds for flow in found if flow.overlapped)
    forward, backward = _networks(config, step_cost, local_batch, rates)
    crowd = gpus if rates.device == "cpu" else 1
    return StepTime(
        loader=_loader(local_batch, rates, loader_rate),
        augment=crowd * sweeps * _augment(config, local_batch, rates),
        forward=crowd * forward,
        backward=crowd * backward,
        loss=crowd * _loss(config, loss.flops, loss.exponentials, rates),
        update=crowd * _update(config, step_cost, rates),
        network=network,
        hidden=hidden,
        passes=passes,
    )


def _in_pieces(config: RunConfig, step_cost: StepCost, local_batch: int) -> tuple[float, float]:
    """How often views are made, and how many times the networks' usual time is taken."""
    if not 0 < config.micro_batch < local_batch:
        return 1.0, 1.0
    if config.micro_batch_norm == "piece":
        return 2.0, 4 / 3
    layers = len(
        step_cost.norms
    )  # see trainer.parallel.micro_batch_norm: L/2 + 3/2 L + 3 forward passes
    return 2.0 * layers + 2, (2 * layers + 3) / 3


def _networks(
    config: RunConfig, step_cost: StepCost, local_batch: int, rates: Rates
) -> tuple[float, float]:
    """Forward and backward pass of the whole local batch, once."""
    measured = rates.calibration
    if measured is not None:
        seconds = measured.base_seconds + measured.image_seconds * local_batch
        return seconds / 3, 2 * seconds / 3
    pieces, width = local_batch / step_cost.images, _WIDTH[config.precision]
    return (
        pieces * _operations(step_cost.forward, rates, width),
        pieces * _operations(step_cost.backward, rates, width),
    )


def _operations(work: Iterable[Operation], rates: Rates, width: float) -> float:
    flops = rates.gpu.flops * rates.gpu.flops_fraction * width
    bandwidth = rates.gpu.bandwidth * rates.gpu.bandwidth_fraction
    busy = [each for each in work if each.flops or each.bytes]
    device = sum(max(each.flops / flops, each.bytes / bandwidth) for each in busy)
    return max(device, len(busy) * rates.launch_seconds)


def _augment(config: RunConfig, local_batch: int, rates: Rates) -> float:
    if rates.calibration is not None:
        return rates.calibration.augment_seconds * local_batch
    side = config.crop.size
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    moved = bytes_moved(Objective.views * local_batch, side, side, dtype).planned
    return moved / (rates.gpu.bandwidth * rates.augment_fraction)


def _loss(config: RunConfig, flops: float, exponentials: float, rates: Rates) -> float:
    if rates.calibration is not None:
        return rates.calibration.loss_seconds * flops
    peak = rates.gpu.flops
    products = flops / (peak * _WIDTH[config.precision])
    return (products + exponentials / (peak * _POWERS)) / rates.loss_fraction


def _update(config: RunConfig, step_cost: StepCost, rates: Rates) -> float:
    if rates.calibration is not None:
        return rates.calibration.update_seconds
    moved = step_cost.trainable * _UPDATE_BYTES[config.optim.name]
    moved += (step_cost.parameters - step_cost.trainable) * _AVERAGE_BYTES
    return moved / (rates.gpu.bandwidth * rates.gpu.bandwidth_fraction)


def _loader(local_batch: int, rates: Rates, loader_rate: float) -> float:
    if rates.device == "cpu" and rates.calibration is not None:
        return 0.0  # in the measured step
    return local_batch / (rates.cores * loader_rate)
