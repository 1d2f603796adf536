"""Memory and time of one step by global batch: whole, and in pieces with both kinds of BatchNorm.

    python benchmarks/micro_batch.py --batches 512 1024 2048 4096 8192 --piece 128

Every figure is from a process of its own, on random crops of 32 pixels: the largest memory in use
during the step beyond that before it (model, crops and one small step done), and the time of the
second of two steps. `--encoder small` is three convolutions with BatchNorm, for the curve of
memory; `--encoder resnet18` shows what exact statistics cost a real network.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from data_pipeline.augment import Augment, simclr_views
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.order import Position
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.simclr import SimCLR, SimCLRConfig
from trainer.parallel.strategy import launch_fabric
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm
from trainer.step import Gradients, InPieces, WholeBatch

SIDE = 32


def three_convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gradients(encoder_name: str, mode: str, piece: int) -> Gradients:
    torch.manual_seed(0)
    # A user's own network is named by its import path; the script's folder is on it.
    name = "micro_batch:three_convolutions" if encoder_name == "small" else encoder_name
    encoder = build_encoder(EncoderConfig(name=name, image_size=SIDE))
    objective = SimCLR(encoder, ProjectionHead(encoder.feature_dim, HeadConfig()), SimCLRConfig())
    convert_sync_batch_norm(objective)
    fabric = launch_fabric("cpu", "fp32")
    model = fabric.setup_module(objective)
    augment = Augment(simclr_views(blur=False), 0)
    if mode == "whole":
        return WholeBatch(fabric, objective, model, augment)
    norm = "exact" if mode == "exact" else "piece"
    return InPieces(
        fabric,
        objective,
        model,
        augment,
        size=piece,
        norm=norm,  # type: ignore[arg-type]
        reseed=lambda step, number: None,
    )


def random_batch(count: int) -> Batch:
    crops = torch.randint(0, 256, (count, 2, SIDE, SIDE, 3), dtype=torch.uint8)
    return Batch((crops,), torch.arange(count), torch.full((count,), -1), Position(0, 0))


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(encoder: str, mode: str, piece: int, count: int) -> dict[str, float]:
    torch.set_num_threads(1)
    step = gradients(encoder, mode, piece)
    step(random_batch(2 * piece if mode != "whole" else 32), 0)
    batch = random_batch(count)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before, start = status("VmRSS"), time.perf_counter()
    step(batch, 1)
    return {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--piece", type=int, default=128, help="images in memory at a time")
    parser.add_argument("--encoder", choices=["small", "resnet18"], default="small")
    parser.add_argument("--modes", nargs="+", default=["whole", "exact", "piece"])
    parser.add_argument("--one", nargs=2, metavar=("MODE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.encoder, args.one[0], args.piece, int(args.one[1]))))
        return
    print(f"{args.encoder}, {SIDE} pixels, float32, one thread, pieces of {args.piece}")
    print(f"{'batch':>7}  {'':8}{'extra MB':>10}{'seconds':>10}")
    for count in args.batches:
        for mode in args.modes:
            command = [sys.executable, __file__, "--encoder", args.encoder]
            command += ["--piece", str(args.piece), "--one", mode, str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            megabytes = figures["bytes"] / 1e6
            print(f"{count:>7}  {mode:8}{megabytes:>10.0f}{figures['seconds']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
