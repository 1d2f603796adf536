"""Rates measured on this machine: a few steps of the recipe at two small batches.

Every batch is a process of its own that trains as a run does (:mod:`trainer.planner.probe`). The
straight line through both peaks of memory, over what was counted for each, gives what a process
takes before any tensor and what it takes for each byte counted; the line through both times, the
cost of a step and of an image.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import ConfigError
from common.files.strict_json import dump_json
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.beton import name_of, sample_count
from trainer.config import DataConfig, RunConfig, to_json
from trainer.parallel.machine import with_precision
from trainer.planner.loss_cost import loss_costs
from trainer.planner.probe import Reading
from trainer.planner.rates import Calibration, Rates
from trainer.planner.step_cost import StepCost, count_step
from trainer.telemetry import TelemetryConfig

_STEPS = 5
_WORK = {"cpu": 4e11, "cuda": 2e13}  # FLOPs of the larger batch's step: a second or a few
_LARGEST = {"cpu": 128, "cuda": 256}
_PATIENCE = 600.0  # seconds for one process
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def calibrate(config: RunConfig, known: bool, rates: Rates) -> Rates:
    """Measure ``config`` on this machine.

    Args:
        config: the run; its batch is not used. Nothing is written to its folder.
        known: whether ``config.data.train`` names files; without any, images are generated.
        rates: stated ones, which stay between GPUs, where nothing is measured.

    Raises:
        ConfigError: the recipe does not run here; says what the process said.
    """
    device: str = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = with_precision(config, device)
    with tempfile.TemporaryDirectory(prefix="widebatch-plan-") as name:
        folder = Path(name)
        # An epoch may leave out a batch, less one image.
        count = max(256, config.objective.least_samples()[0] + max(_LARGEST.values()))
        data = config.data.train if known else (generate(folder, config.crop.size, count),)
        readings, counts = [], []
        samples = sum(map(sample_count, data))
        for batch in _batches(config, device, samples):
            tried = dataclasses.replace(
                config,
                data=DataConfig(train=data),
                out=folder / f"run-{batch}",
                batch=batch,
                steps=_STEPS + 1,
                resume="never",
                micro_batch=0,
                checkpoint=dataclasses.replace(config.checkpoint, every_epochs=0),
                telemetry=TelemetryConfig(tensorboard=False),
            )
            readings.append(_probe(tried))
            counts.append(count_step(tried, 1, device, samples))
    return calibrated(rates, config, readings, counts)


def calibrated(
    rates: Rates, config: RunConfig, readings: list[Reading], counts: list[StepCost]
) -> Rates:
    """``rates`` with those of two readings, the smaller batch first, and what each was counted."""
    low, high = readings
    counted = counts[1].peak - counts[0].peak
    factor = (high.peak_bytes - low.peak_bytes) / counted if counted else 1.0
    factor = min(max(factor, 1.0), 3.0)  # noise, where what was counted hardly differs
    low_rest, high_rest = _rest(low), _rest(high)
    slope = max(0.0, (high_rest - low_rest) / (high.batch - low.batch))
    slope = min(slope, high_rest / high.batch)  # a step without images takes no less than nothing
    costs = loss_costs(config, high.batch, 1, counts[1].num_samples)
    return dataclasses.replace(
        rates,
        gpu=dataclasses.replace(rates.gpu, name=high.name, memory=high.memory),
        context_bytes=max(0.0, high.peak_bytes - factor * counts[1].peak),
        memory_factor=factor,
        loader_rate=rates.loader_rate or 1 / high.core_seconds,
        calibration=Calibration(
            device=high.device,
            batches=(low.batch, high.batch),
            base_seconds=high_rest - slope * high.batch,
            image_seconds=slope,
            augment_seconds=high.augment_seconds / high.batch,
            loss_seconds=high.loss_seconds / sum(cost.flops for cost in costs),
            update_seconds=high.update_seconds,
        ),
    )


def _rest(reading: Reading) -> float:
    """Of a step, what is neither augmentation, loss, update nor, beside a GPU, the loader."""
    wait = reading.wait_seconds if reading.device == "cuda" else 0.0
    others = reading.augment_seconds + reading.loss_seconds + reading.update_seconds
    return max(reading.step_seconds - wait - others, 0.1 * reading.step_seconds)


def _batches(config: RunConfig, device: str, samples: int) -> tuple[int, int]:
    """A smaller and a larger batch whose steps take seconds at most."""
    four = count_step(dataclasses.replace(config, batch=4, micro_batch=0), 1, device)
    large = int(_WORK[device] / max(four.flops / 4, 1.0))
    large = max(8, min(large - large % 8, _LARGEST[device], samples - samples % 2))
    if large > samples:
        name = name_of(config.data.train)
        raise ConfigError(f"--calibrate needs at least 8 samples; {name}: {samples}")
    return max(4, large // 2), large


def _probe(config: RunConfig) -> Reading:
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    request = dump_json({"config": to_json(config), "steps": _STEPS})
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "trainer.planner.probe"],
            input=request,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"--calibrate: {_STEPS} steps of {config.batch} images took more than"
            f" {_PATIENCE:.0f} seconds here; calibrate where the recipe can train"
        ) from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--calibrate: {config.batch} images did not train here: {said}")
    return Reading(**json.loads(lines[-1]))


def generate(folder: Path, side: int, count: int) -> Path:
    """Smooth images with grain, a seventh larger than a crop: for where there is no data."""
    random = np.random.default_rng(0)
    size = max(32, side + side // 7)
    source = folder / "generated"
    source.mkdir()
    for number in range(count):
        coarse = random.integers(0, 256, (6, 6, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.float32) + random.normal(0, 6, (size, size, 1))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(source / f"{number:04d}.jpg", quality=90)
    path = folder / "generated.beton"
    pack(str(source), path, PackConfig(), progress=False)
    return path
