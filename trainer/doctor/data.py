"""The data file, and whether its loader keeps up with the network."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common.collectives import all_gather_json, rank_and_size
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_beton import OpenBeton
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from trainer.config import RunConfig
from trainer.doctor.finding import Finding, judged
from trainer.objectives.base import blank_inputs
from trainer.parallel.machine import settle_threads, with_precision
from trainer.parallel.networks import build_objective
from trainer.run import COMPUTE_DTYPE

_SECONDS = 5.0
_IMAGES = 32  # of a process and batch


def data_file(path: Path) -> Iterator[Finding]:
    """Every table, JPEG header and the checksum; the same file on all ranks. A collective."""
    beton = OpenBeton(path)
    same = len(set(all_gather_json(beton.verify()))) == 1
    said = (
        f"{beton.info.num_samples} samples, checksum right"
        if same
        else "not the same file on all ranks"
    )
    yield judged(
        "data",
        same,
        f"{path}: {said}",
        "bad",
        "copy one file to all nodes, or name one on a shared file system",
    )


def keeps_up(config: RunConfig, device: torch.device) -> Iterator[Finding]:
    """Images per second of this process's loader, and of its network. A collective."""
    rank, size = rank_and_size()
    config = with_precision(config, device.type)
    data = OpenData(config.data.train)
    samples = data.info.num_samples
    images = min(_IMAGES, config.batch // size, samples // size)
    with torch.random.fork_rng(devices=[]):
        needed = _network_rate(config, device, images, samples)
    loader = TrainLoader(
        data,
        config.view_plan(),
        settle_threads(config.loader, device),
        seed=config.seed,
        batch_size=images * size,
        rank=rank,
        world_size=size,
        device=device,
    )
    try:
        rate = _loader_rate(loader.starting_at(Position(0, 0)), images)
    finally:
        loader.close()
    yield judged(
        "loader",
        rate > 1.2 * needed,
        f"loads {rate:.0f} images/s, trains {needed:.0f} images/s, each alone, per process",
        "note",
        "the network will wait: give each process more cores (--loader.workers), or pack "
        "smaller images (widebatch pack --max-side)",
    )


def _network_rate(config: RunConfig, device: torch.device, images: int, num_samples: int) -> float:
    objective = build_objective(config, num_samples=num_samples)
    objective = objective.to(memory_format=torch.channels_last).to(device)
    if config.precision == "fp64":
        objective = objective.double()
    dtype = COMPUTE_DTYPE[config.precision]
    inputs = blank_inputs(config.view_plan(), images, dtype, device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            features = [objective.encoder(views.flatten(0, 1)) for views in inputs.views]
        torch.cat(features).float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return images / min(seconds)


def _loader_rate(batches: Iterator[object], images: int) -> float:
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        next(batches)
        count += 1
    return count * images / (time.perf_counter() - start)
