"""What a checkpoint costs the step that it belongs to, and the steps behind which it is written.

    python benchmarks/checkpoint.py --rounds 9

ResNet-50 with SimCLR's head and LARS, after a step. Contenders take turns within each round; the
table shows medians, of:

- blocked: until the call returns and training may go on;
- on disk: until the checkpoint is complete;
- slowed: what "training" (matrix products on one thread) loses until then to the writing thread.

Ours writes checksums and flushes every file to disk, and keeps two checkpoints. `torch.save` does
neither; it is shown with a flush too, which a checkpoint needs to survive a power cut. DCP is
torch.distributed.checkpoint, flushing files as is its default: async_save as it comes, and with
staging memory that is kept from one save to the next (DefaultStager), pinned where there is a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.simclr import SimCLR, SimCLRConfig
from trainer.optim.optimizers import OptimConfig, build_optimizer
from trainer.state.checkpoint import (
    CheckpointConfig,
    CheckpointSaver,
    CheckpointStore,
    optimizer_tensors,
)

Parts = Mapping[str, dict[str, torch.Tensor]]
Save = Callable[[int, Parts, Path], Callable[[], bool]]
"""Saves a step into a folder of its own; returns what says whether it is still being written."""

ASYNCHRONOUS, SYNCHRONOUS = "widebatch, asynchronous", "widebatch, synchronous"


def trained(device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet50"))
    objective = SimCLR(encoder, ProjectionHead(encoder.feature_dim, HeadConfig()), SimCLRConfig())
    objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(objective, OptimConfig(name="lars"))
    for parameter in objective.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return objective, optimizer


def ours(asynchronous: bool) -> Save:
    savers: dict[Path, CheckpointSaver] = {}

    def save(step: int, parts: Parts, folder: Path) -> Callable[[], bool]:
        if folder not in savers:
            config = CheckpointConfig(asynchronous=asynchronous, max_failures=1)
            savers[folder] = CheckpointSaver(CheckpointStore(folder), config, is_writer=True)
        saver = savers[folder]
        saver.save({"step": step}, parts)

        def is_writing() -> bool:
            assert saver.failure() == 0
            return saver.is_writing

        return is_writing

    return save


def torch_save(flush: bool) -> Save:
    def save(step: int, parts: Parts, folder: Path) -> Callable[[], bool]:
        folder.mkdir(exist_ok=True)
        with (folder / f"{step}.pt").open("wb") as file:
            torch.save(parts, file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        return lambda: False

    return save


def dcp_async_save(keep_memory: bool) -> Save:
    stager = None
    if keep_memory:
        on_gpu = torch.cuda.is_available()
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=on_gpu,
                use_non_blocking_copy=on_gpu,
            )
        )

    def save(step: int, parts: Parts, folder: Path) -> Callable[[], bool]:
        response: Any = dcp.async_save(
            dict(parts), checkpoint_id=folder / str(step), async_stager=stager, no_dist=True
        )
        if hasattr(response, "staging_completion"):  # before that the tensors must not change
            response.staging_completion.result()
            response = response.upload_completion

        def is_writing() -> bool:
            if response.done():
                response.result()
            return not response.done()

        return is_writing

    return save


def work(size: int) -> Callable[[], float]:
    """A few milliseconds of training's kind of work; returns its seconds."""
    left = torch.randn(size, size)

    def once() -> float:
        start = time.perf_counter()
        torch.mm(left, left)
        return time.perf_counter() - start

    return once


def retire(folder: Path, step: int) -> None:
    """Two checkpoints stay, outside the clock; ours does so itself, inside."""
    for old in (folder / f"{step - 2}.pt", folder / str(step - 2)):
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()


def measure(
    save: Save, step: int, parts: Parts, folder: Path, once: Callable[[], float], alone: float
) -> dict[str, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    is_writing = save(step, parts, folder)
    blocked = time.perf_counter() - start
    units = []
    while is_writing():
        units.append(once())
    on_disk = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"blocked": blocked, "on disk": on_disk, "slowed": sum(units) - len(units) * alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: /tmp's")
    parser.add_argument("--json", type=Path, help="write every measurement there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    objective, optimizer = trained(torch.device(args.device))
    parts = {"model": objective.state_dict(), "optimizer": optimizer_tensors(objective, optimizer)}
    size = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    contenders: dict[str, Save] = {
        ASYNCHRONOUS: ours(asynchronous=True),
        SYNCHRONOUS: ours(asynchronous=False),
        "torch.save": torch_save(flush=False),
        "torch.save, flushed": torch_save(flush=True),
        "DCP async_save": dcp_async_save(keep_memory=False),
        "DCP async_save, kept memory": dcp_async_save(keep_memory=True),
    }
    once = work(512)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for step in range(1, args.rounds + 2):  # the first warms up and does not count
            alone = statistics.median(once() for _ in range(21))
            for number, (name, save) in enumerate(contenders.items()):
                folder = Path(scratch) / str(number)
                figures = measure(save, step, parts, folder, once, alone)
                retire(folder, step)
                if step > 1:
                    found[name].append(figures)
    report(found, size, args.device)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "seconds": found}, indent=1))


def report(found: dict[str, list[dict[str, float]]], size: int, device: str) -> None:
    version = importlib.metadata.version("torch")
    print(f"ResNet-50 with LARS on {device}: {size / 1e6:.0f} MB, torch {version}, milliseconds")
    columns = ("blocked", "on disk", "slowed")
    print(f"{'':30}" + "".join(f"{column:>10}" for column in columns) + f"{'of ours':>12}")
    medians = {
        name: {column: statistics.median(f[column] for f in figures) * 1e3 for column in columns}
        for name, figures in found.items()
    }
    for name, values in medians.items():
        ratio = values["blocked"] / medians[SYNCHRONOUS]["blocked"]
        cells = "".join(f"{values[column]:>10.1f}" for column in columns)
        print(f"{name:30}{cells}{ratio:>11.1%}")
    print("of ours: blocked time as a share of that of our synchronous save; aim: at most 10 %")


if __name__ == "__main__":
    main()
