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
from trainer.objectives.cost import LossCost
from trainer.planner.ledger import Operation
from trainer.planner.loss_cost import loss_costs
from trainer.planner.rates import Calibration, Rates
from trainer.planner.step_cost import StepCost
from trainer.planner.traffic import Cluster, Flow

_UPDATE_BYTES = {"lars": 48, "sgd": 24, "adamw": 32}  # a parameter, with the gradient's norm
_AVERAGE_BYTES = 28  # a parameter of the key encoder: the average, and the copy for a skipped step
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
    cluster: Cluster,
    found: Iterable[Flow],
    core_rate: float,
) -> StepTime:
    """Predict a step in which ``found`` travels; a core reads ``core_rate`` images a second."""
    rates, local_batch = cluster.rates, config.batch // cluster.world_size
    losses = loss_costs(config, local_batch, cluster.world_size, step_cost.num_samples)
    if rates.calibration is not None:
        parts = _measured(rates.calibration, local_batch, losses)
    else:
        parts = _stated(config, step_cost, local_batch, losses, rates)
    sweeps, passes = _in_pieces(config, step_cost, local_batch)
    parts["augment"] *= sweeps
    crowd, loader = 1, local_batch / (rates.cores * core_rate)
    if rates.device == "cpu":
        crowd, loader = cluster.gpus, 0.0  # in the measured step
    return StepTime(
        **{name: crowd * seconds for name, seconds in parts.items()},
        loader=loader,
        network=sum(flow.seconds for flow in found if not flow.overlapped),
        hidden=sum(flow.seconds for flow in found if flow.overlapped),
        passes=passes,
    )


def _in_pieces(config: RunConfig, step_cost: StepCost, local_batch: int) -> tuple[float, float]:
    """How often views are made, and how many times the networks' usual time is taken."""
    if not 0 < config.micro_batch < local_batch:
        return 1.0, 1.0
    if config.micro_batch_norm == "piece":
        return 2.0, 4 / 3
    return 2.0 * len(step_cost.norms) + 2, step_cost.exact_passes


def _measured(
    found: Calibration, local_batch: int, losses: tuple[LossCost, ...]
) -> dict[str, float]:
    """Seconds of a whole local batch by part, on one device that nothing else uses."""
    networks = found.base_seconds + found.image_seconds * local_batch
    return {
        "augment": found.augment_seconds * local_batch,
        "forward": networks / 3,
        "backward": 2 * networks / 3,
        "loss": found.loss_seconds * sum(loss.flops for loss in losses),
        "update": found.update_seconds,
    }


def _stated(
    config: RunConfig,
    step_cost: StepCost,
    local_batch: int,
    losses: tuple[LossCost, ...],
    rates: Rates,
) -> dict[str, float]:
    """The same by stated rates."""
    pieces, peak = local_batch / step_cost.images, rates.gpu.flops
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    width = _WIDTH[config.precision]
    groups = [(len(group.looks), group.crop.size) for group in config.view_plan()]
    views = sum(bytes_moved(count * local_batch, side, side, dtype) for count, side in groups)
    products = sum(loss.flops for loss in losses) / (peak * width)
    exponentials = sum(loss.times * loss.exponentials for loss in losses) / (peak * _POWERS)
    update = step_cost.trainable * _UPDATE_BYTES[config.optim.name]
    update += (step_cost.parameters - step_cost.trainable) * _AVERAGE_BYTES
    return {
        "augment": views / (rates.gpu.bandwidth * rates.augment_fraction),
        "forward": pieces * _operations(step_cost.forward, rates, width),
        "backward": pieces * _operations(step_cost.backward, rates, width),
        "loss": (products + exponentials) / rates.loss_fraction,
        "update": update / (rates.gpu.bandwidth * rates.gpu.bandwidth_fraction),
    }


def _operations(work: Iterable[Operation], rates: Rates, width: float) -> float:
    flops = rates.gpu.flops * rates.gpu.flops_fraction * width
    bandwidth = rates.gpu.bandwidth * rates.gpu.bandwidth_fraction
    busy = [each for each in work if each.flops or each.bytes]
    device = sum(max(each.flops / flops, each.bytes / bandwidth) for each in busy)
    return max(device, len(busy) * rates.launch_seconds)
