"""What each objective learns of small images in the same time, beside an untrained encoder.

    python benchmarks/objectives.py --train train.beton --test test.beton --minutes 5
    python benchmarks/objectives.py --train train96.beton --test test96.beton --size 96

A small ResNet and one process, which takes twice the minutes that two cores would: --minutes 5 is
ten of one core, so give each core its own command and half of the --objectives. How many steps that
is, two short runs of each objective tell, unless --steps names it: with the counts of one machine
(--count) the table is the same on another. Learning rates are those of so short a run; all else is
the recipe's. Supervised training, SimCLR and the untrained encoder stand beside them. Pretext tasks
are often at their best before an encoder's last stage, so there is a linear classifier for each.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo import processor
from demo import run as command

CORES = 2
_LARGE = 90  # pixels from which on an image has room for tiles
_PROBE_STEPS = (10, 50)  # of two short runs
_PROCESSES = ("--devices", "1")
_SMALL = ("--encoder.name", "resnet8x2", "--encoder.stem", "cifar-stride2")
_COMMON = (
    *("--precision", "fp32", "--schedule.kind", "cosine", "--schedule.warmup-epochs", "0.35"),
    *("--knn.every-epochs", "100000", "--checkpoint.every-epochs", "0"),
)
_FAST = ("--optim.base-lr", "4")
RUNS = {
    "supervised": ("supervised-cifar10-r18",),
    "supcon": ("supcon-cifar10-r18", "--batch", "256"),
    "simclr": ("simclr-cifar10-r18", "--batch", "256", *_FAST),
    "cpc": ("cpc-cifar10-r18", "--batch", "128"),
    "essl": ("essl-cifar10-r18", "--batch", "256", *_FAST),
    "byol": ("byol-cifar10-r18", *_FAST),
    "simsiam": ("simsiam-cifar10-r18",),
    "vicreg": ("vicreg-cifar10-r18",),
    "swav": ("swav-cifar10-r18", *_FAST),
    "dino": ("dino-cifar10-r18", *_FAST),
    "barlowtwins": ("barlowtwins-cifar10-r18",),
    "pirl": ("pirl-cifar10-r18",),
    "npid": ("npid-cifar10-r18",),
    "deepclusterv2": ("deepclusterv2-cifar10-r18", *_FAST),
    "sela": ("sela-cifar10-r18", *_FAST),
    "deepcluster": ("deepcluster-cifar10-r18",),
    "nnclr": ("nnclr-cifar10-r18", *_FAST),
    "rotation": ("rotation-cifar10-r18",),
    "colourisation": ("colourisation-cifar10-r18",),
    "inpainting": ("inpainting-cifar10-r18",),
    "context": (
        *("inpainting-cifar10-r18", "--objective.hidden", "centre", "--objective.power", "2"),
        *("--objective.adversarial", "0.001"),
    ),
    "autoencoder": ("autoencoder-cifar10-r18",),
    "denoising": ("autoencoder-cifar10-r18", "--objective.given", "noisy"),
    "superresolution": ("autoencoder-cifar10-r18", "--objective.given", "small"),
    "vae": ("vae-cifar10-r18",),
    "gan": ("gan-cifar10-r18",),
    "bigan": (*("gan-cifar10-r18", "--objective.learns", "inverse", "--encoder.norm", "batch"),),
    "mae": ("mae-cifar10-vitti4", "--batch", "256"),
    "ibot": ("ibot-cifar10-vitti4",),
}
# Tiles need larger images: --size 96.
PATCHES = {
    "supervised": ("supervised-cifar10-r18", "--crop.size", "64"),
    "simclr": ("simclr-cifar10-r18", "--crop.size", "64", "--batch", "256", *_FAST),
    "jigsaw": ("jigsaw-stl10-r18",),
    "relativepatch": ("relativepatch-stl10-r18",),
}
LAYERS = ("layer1", "layer2", "layer3")
_TRANSFORMERS = ("mae", "ibot")


def pretraining(recipe: str, *settings: str, files: list[str], knn: bool = False) -> list[str]:
    """The command of a run, but for its length and place."""
    small = () if recipe.startswith(_TRANSFORMERS) else _SMALL
    data = files if knn else files[:2]
    return ["pretrain", recipe, *small, *_COMMON, *settings, *data, *_PROCESSES]


def pretrain(words: Sequence[str], out: Path, steps: int) -> float:
    """Processor seconds of a run of so many steps."""
    return command([*words, "--out", str(out), "--steps", str(steps)])[1]


def records(run: Path) -> list[dict[str, float]]:
    """What a run wrote at each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(words: Sequence[str], out: Path, seconds: float) -> int:
    """Steps that take so many processor seconds; what comes once in a run is not counted."""
    used = [pretrain(words, out.with_name(f"{out.name}-{steps}"), steps) for steps in _PROBE_STEPS]
    few, many = _PROBE_STEPS
    return max(1, round(seconds * (many - few) / (used[1] - used[0])))


def top1(method: str, source: str, files: list[str], out: Path, *settings: str) -> float:
    """In %, by 200 neighbours or a linear classifier."""
    command(["evaluate", method, source, *files, *settings, "--json", str(out), *_PROCESSES])
    return 100 * float(json.loads(out.read_text())["top1"])


def judged(name: str, source: str, files: list[str], folder: Path, knn: float = 0) -> str:
    """kNN (where a run has not counted it), and a linear classifier of each stage."""
    layers = () if name.startswith(_TRANSFORMERS) or source.startswith("pixels:") else LAYERS
    own = knn or top1("knn", source, files, folder / f"{name}-knn.json")
    found = [
        top1("linear", source, files, folder / f"{name}-{layer}.json", "--layer", layer)
        for layer in layers
    ] or [top1("linear", source, files, folder / f"{name}-linear.json")]
    return f"kNN {own:5.1f} %, linear " + " / ".join(f"{each:.1f}" for each in found) + " %"


def task(first: dict[str, float], last: dict[str, float]) -> str:
    """The loss and what the task itself counts, at first and at last."""
    names = ["loss", *(name for name in first if name.endswith(("_top1", "_loss", "psnr")))]
    return ", ".join(f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in names)


def main() -> None:
    """Train by each objective and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, metavar="FILE.beton")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE.beton")
    parser.add_argument("--minutes", type=float, default=5, help="of two cores (default 5)")
    parser.add_argument("--size", type=int, default=32, help="of the images, pixels (default 32)")
    parser.add_argument("--objectives", nargs="+", choices={**RUNS, **PATCHES}, metavar="NAME")
    parser.add_argument("--steps", nargs="+", default=[], metavar="NAME=N", help="known steps")
    parser.add_argument(
        "--count", action="store_true", help="print each one's NAME=N for --steps, and train none"
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="no untrained encoder, no pixels"
    )
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="of every run")
    args = parser.parse_args()
    files = ["--data.train", str(args.train), "--data.test", str(args.test)]
    known = dict(each.split("=") for each in args.steps)
    runs = {
        name: (*run, *args.settings)
        for name, run in (RUNS if args.size < _LARGE else PATCHES).items()
        if not args.objectives or name in args.objectives
    }
    print(f"{processor()}, {args.minutes:g} minutes on {CORES} cores")
    print(f"linear: a classifier on {', '.join(LAYERS)}, or on what comes last where one stands")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        baselines = {"pixels": f"pixels:{args.size}"}
        for run in [*runs.values()][:1]:  # compiles for all that follow
            pretrain(pretraining(*run, files=files, knn=True), folder / "first", 1)
        for name, run in runs.items():
            seconds = 60 * args.minutes * CORES
            alone = pretraining(*run, files=files)
            steps = int(known.get(name) or steps_of(alone, folder / name, seconds))
            if args.count:
                print(f"{name}={steps}", flush=True)
                continue
            spent = pretrain(pretraining(*run, files=files, knn=True), folder / name, steps)
            first, *_, last = records(folder / name)
            found = judged(name, str(folder / name), files, folder, 100 * last["knn_top1"])
            print(
                f"{name:15} {found}; {steps} steps, epoch {last['epoch'] + 1},"
                f" {spent / 60:.1f} processor minutes; {task(first, last)}",
                flush=True,
            )
            if not name.startswith(_TRANSFORMERS):
                baselines |= {"untrained": f"untrained:{folder / name}"}
        for title, source in () if args.no_baselines or args.count else baselines.items():
            print(f"{title:15} {judged(title, source, files, folder)}")


if __name__ == "__main__":
    main()
