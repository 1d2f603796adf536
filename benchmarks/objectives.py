"""What each objective learns of small images in the same time: kNN beside an untrained encoder.

    python benchmarks/objectives.py --train train.beton --test test.beton --minutes 10

A small ResNet, two cores; a budget is of processor time, which a busy machine changes little: ten
minutes on two cores are twenty of processors. How many steps that is, a first run of each objective
tells, unless --steps names it. Learning rates are those of so short a run; all else is the
recipe's. SimCLR and the untrained encoder stand beside them.
"""

import argparse
import json
import tempfile
from pathlib import Path

from demo import processor, run

CORES = 2
_PROBE = (8, 40)  # steps of the two runs whose difference is the time of a step
_PROCESSES = ("--devices", str(CORES))
_SMALL = ("--encoder.name", "resnet8x2", "--encoder.stem", "cifar-stride2")
_COMMON = (
    *("--precision", "fp32", "--schedule.kind", "cosine", "--schedule.warmup-epochs", "0.35"),
    *("--knn.every-epochs", "100000", "--checkpoint.every-epochs", "0"),
)
RUNS = {
    "simclr": ("simclr-cifar10-r18", "--batch", "256", "--optim.base-lr", "4"),
    "rotation": ("rotation-cifar10-r18",),
    "npid": ("npid-cifar10-r18",),
    "deepclusterv2": ("deepclusterv2-cifar10-r18", "--optim.base-lr", "4"),
    "inpainting": ("inpainting-cifar10-r18",),
    "autoencoder": ("autoencoder-cifar10-r18",),
    "denoising": ("autoencoder-cifar10-r18", "--objective.given", "noisy"),
    "superresolution": ("autoencoder-cifar10-r18", "--objective.given", "small"),
    "colourisation": ("colourisation-cifar10-r18", "--encoder.sees", "grey"),
    "supcon": ("supcon-cifar10-r18", "--batch", "256"),
    "supervised": ("supervised-cifar10-r18",),
}


def pretrain(name: str, out: Path, files: list[str], steps: int, knn: bool) -> float:
    """Processor seconds of a run of so many steps."""
    recipe, *settings = RUNS[name]
    words = [
        "pretrain",
        recipe,
        *_SMALL,
        *_COMMON,
        *settings,
        *files[: None if knn else 2],
        *_PROCESSES,
    ]
    return run([*words, "--out", str(out), "--steps", str(steps)])[1]


def steps_of(name: str, folder: Path, files: list[str], seconds: float) -> int:
    """Steps that take so many processor seconds; what comes once in a run is not counted."""
    few, many = (
        pretrain(name, folder / f"{name}-{steps}", files, steps, knn=False) for steps in _PROBE
    )
    return round(seconds * (_PROBE[1] - _PROBE[0]) / (many - few))


def knn(source: str, files: list[str], out: Path) -> float:
    """Top-1 in %, by 200 neighbours."""
    run(["evaluate", "knn", source, *files, "--json", str(out), *_PROCESSES])
    return 100 * float(json.loads(out.read_text())["top1"])


def main() -> None:
    """Train by each objective and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, metavar="FILE.beton")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE.beton")
    parser.add_argument("--minutes", type=float, default=10, help="on two cores (default 10)")
    parser.add_argument("--objectives", nargs="+", default=list(RUNS), choices=RUNS, metavar="NAME")
    parser.add_argument("--steps", nargs="+", default=[], metavar="NAME=N", help="known steps")
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="of every run")
    args = parser.parse_args()
    files = ["--data.train", str(args.train), "--data.test", str(args.test)]
    known = dict(each.split("=") for each in args.steps)
    for name in RUNS:
        RUNS[name] += tuple(args.settings)
    print(f"{processor()}, {args.minutes:g} minutes on {CORES} cores")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        baselines = {"pixels": "pixels:32"}
        for name in args.objectives:
            seconds = 60 * args.minutes * CORES
            steps = int(known.get(name) or steps_of(name, folder, files, seconds))
            spent = pretrain(name, folder / name, files, steps, knn=True)
            records = (folder / name / "metrics.jsonl").read_text().splitlines()
            first, last = json.loads(records[0]), json.loads(records[-1])
            top1 = knn(str(folder / name), files, folder / f"{name}.json")
            print(
                f"{name:14} kNN {top1:5.1f} %  {steps} steps, epoch {last['epoch'] + 1},"
                f" loss {first['loss']:.3f} -> {last['loss']:.3f}, {spent / 60:.1f} processor"
                " minutes",
                flush=True,
            )
            baselines |= {"untrained": f"untrained:{folder / name}"}
        for title, source in baselines.items():
            print(f"{title:14} kNN {knn(source, files, folder / f'{title}.json'):5.1f} %")


if __name__ == "__main__":
    main()
