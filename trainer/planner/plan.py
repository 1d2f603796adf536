"""The plan of a run on a cluster: everything that ``widebatch plan`` says, as plain values.

:func:`make_plan` puts together what the other files of this package count.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import ConfigError
from data_pipeline.reading.open_data import OpenData
from data_pipeline.views import decodes
from trainer.config import RunConfig, RunPlan, plan_run, to_json
from trainer.parallel.machine import with_precision
from trainer.planner.memory import DeviceMemory, Remedy, can_be_split, memory, remedy
from trainer.planner.rates import Rates, stated_loader_rate
from trainer.planner.step_cost import count_step
from trainer.planner.step_time import StepTime, step_time
from trainer.planner.traffic import Cluster, Flow, flows

_JPEG_BYTES = 0.59  # a pixel: ImageNet-1k's files, 110 kB of 500 x 375 on average

# Data sets that recipes are for: images to train on, pixels of one.
_STATED = {
    "ucf101": ("UCF-101's frames", 2_484_199, 320 * 240),
    "r50": ("ImageNet-1k", 1_281_167, 500 * 375),
    "vits16": ("ImageNet-1k", 1_281_167, 500 * 375),
    "vitb16": ("ImageNet-1k", 1_281_167, 500 * 375),
    "cifar10": ("CIFAR-10", 50_000, 32 * 32),
    "stl10": ("STL-10, unlabelled", 100_000, 96 * 96),
    "movingdigits": ("the embedded clips", 17_244, 32 * 32),
    "digits": ("the embedded digits", 1_437, 64 * 64),
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """What is trained on, as far as a plan needs it."""

    count: int
    pixels: float
    """Of an image, on average."""
    bytes: float
    """Of an image in the file, on average."""
    source: str
    """Where these figures are from."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What the loader needs, for each node."""

    images_per_second: float
    """That a node's processes take, when nothing waits for images."""
    core_rate: float
    """Images a core decodes and crops in a second."""
    cores: float
    """Cores that this takes."""
    disk_bytes: float
    """Bytes per second; nothing once the file is in the page cache."""
    file_bytes: float
    """Of the whole data set."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run comes to on a cluster."""

    recipe: str
    precision: str
    device: str
    """Name of the GPU, or of what was measured."""
    nodes: int
    gpus: int
    """On each node."""
    images: Images
    run: RunPlan
    micro_batch: int
    """Images of a process in memory at a time."""
    parameters: int
    trainable: int
    flops: float
    """Of a process's step, networks alone, forward and backward once."""
    memory: DeviceMemory
    remedy: Remedy | None
    """Where the run does not fit."""
    flows: tuple[Flow, ...]
    time: StepTime
    input: Input
    rates: Rates

    @property
    def fits(self) -> bool:
        """Whether a process's device holds a step."""
        return self.memory.fits

    @property
    def images_per_second(self) -> float:
        """Of the whole run."""
        return self.run.global_batch / self.time.seconds

    @property
    def hours(self) -> float:
        """Of the run's steps; checkpoints and evaluations come on top."""
        return self.run.total_steps * self.time.seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.hours * self.nodes * self.gpus


def images_of(config: RunConfig, count: int | None = None, known: bool = True) -> Images:
    """What ``config`` trains on: ``count`` images if the user says so; files where it is ``known``.

    Raises:
        ConfigError: neither file nor number, and a recipe that is for no data set in particular.
        DataError: the file is damaged.
    """
    if known:
        data = OpenData(config.data.train)
        info, table = data.info, data.table
        pixels = float(np.mean(table.heights * table.widths))
        size = float(np.mean(table.sizes))
        return Images(count=count or info.num_samples, pixels=pixels, bytes=size, source=info.name)
    for word, (name, stated, pixels) in _STATED.items():
        if word in config.recipe:
            return Images(
                count=count or stated,
                pixels=float(pixels),
                bytes=_JPEG_BYTES * pixels,
                source="--images" if count else f"stated, {name}",
            )
    raise ConfigError("--images: say how many there are, or name a file by --data.train")


def make_plan(config: RunConfig, cluster: Cluster, images: Images) -> Plan:
    """Count and predict a run.

    Raises:
        ConfigError: the run cannot be started so: :func:`trainer.config.plan_run`'s refusals, and a
            micro-batch with BatchNorm that is not synchronised.
    """
    rates, world_size = cluster.rates, cluster.world_size
    # Without calibration the rates are those of a GPU of the list, all of which have bf16.
    if config.precision == "auto" and rates.calibration is None:
        config = dataclasses.replace(config, precision="bf16")
    config = with_precision(config, rates.device)
    run = plan_run(config, images.count, world_size)
    step_cost = count_step(config, world_size, rates.device, run.num_samples)
    if config.micro_batch and not can_be_split(config, step_cost):
        raise ConfigError(
            "--micro-batch: every BatchNorm must be synchronised; set --sync-batch-norm, and"
            " --objective.key-batch-norm sync for MoCo"
        )
    needed = memory(step_cost, rates, cluster.gpus)
    found = flows(config, step_cost, cluster)
    view_pixels = sum(group.pixels for group in config.view_plan())
    reads = decodes(config.view_plan())
    core_rate = rates.loader_rate or stated_loader_rate(reads * images.pixels, view_pixels)
    time = step_time(config, step_cost, cluster, found, core_rate)
    node_rate = run.local_batch * cluster.gpus / time.device
    return Plan(
        recipe=config.recipe,
        precision=config.precision,
        device=rates.gpu.name,
        nodes=cluster.nodes,
        gpus=cluster.gpus,
        images=images,
        run=run,
        micro_batch=step_cost.images,
        parameters=step_cost.parameters,
        trainable=step_cost.trainable,
        flops=step_cost.flops * run.local_batch / step_cost.images,
        memory=needed,
        remedy=None if needed.fits else remedy(config, step_cost, cluster),
        flows=found,
        time=time,
        input=Input(
            images_per_second=node_rate,
            core_rate=core_rate,
            cores=node_rate / core_rate,
            disk_bytes=node_rate * reads * images.bytes,
            file_bytes=images.count * images.bytes,
        ),
        rates=rates,
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan's plain values, and what follows from them, for readers that do no arithmetic."""
    values: dict[str, Any] = to_json(plan)
    values["summary"] = {
        "fits": plan.fits,
        "memory_bytes": plan.memory.total,
        "step_seconds": plan.time.seconds,
        "bottleneck": plan.time.bottleneck,
        "images_per_second": plan.images_per_second,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }
    return values
