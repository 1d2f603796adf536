"""Few labels, the protocol of Imagewang: pretrain without any, fine-tune, test on other images.

    python benchmarks/imagewang.py --train train.beton --unlabelled unsup.beton --test val.beton

Imagewang (fast.ai) has 14,669 labelled images of 20 classes, of which the 10 breeds of dogs that it
tests have 75 to 147 each, and 7,750 images of those breeds without labels. Every objective
pretrains on the labelled and the unlabelled images, labels aside, for the same processor time; the
test images have no part in it (the inductive form). Then the encoder and a classifier of all 20
classes are trained on the labelled images, from several seeds; no pretraining is the same network
from random weights. A small ResNet and crops of 64 pixels, for two cores: --encoder and --size name
others, and --minutes 0 takes each recipe's own length, for a GPU.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from demo import processor
from demo import run as command
from objectives import CORES, steps_of

_FAST = ("--optim.base-lr", "4")
RUNS = {
    "simclr": ("simclr-cifar10-r18", *_FAST),
    "mocov3": ("mocov3-cifar10-r18", *_FAST),
    "byol": ("byol-cifar10-r18", *_FAST),
    "swav": ("swav-cifar10-r18", *_FAST, "--objective.small-crop.size", "40"),
    "rotation + simclr": ("essl-cifar10-r18", *_FAST, "--objective.tasks.1.side", "40"),
}
NONE = "none"


def fine_tuned(source: str, args: argparse.Namespace, seed: int, out: Path) -> float:
    """Top-1 in % of the test images."""
    words = ["evaluate", "finetune", source, "--data.train", str(args.train)]
    words += ["--data.test", str(args.test), "--epochs", str(args.epochs), "--seed", str(seed)]
    words += ["--base-lr", str(args.base_lr), "--tuning-batch", str(args.batch)]
    command([*words, "--json", str(out), "--devices", str(CORES)])
    return 100 * float(json.loads(out.read_text())["top1"])


def main() -> None:
    """Print a line for each objective, as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("train", "unlabelled", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE.beton")
    parser.add_argument("--minutes", type=float, default=8, help="of two cores, each (default 8)")
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning (default 20)")
    parser.add_argument("--base-lr", type=float, default=0.1, help="of fine-tuning (default 0.1)")
    parser.add_argument("--batch", type=int, default=128, help="of fine-tuning (default 128)")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning (default 3)")
    parser.add_argument("--size", type=int, default=64, help="of crops, pixels (default 64)")
    parser.add_argument("--encoder", default="resnet8x2", help="--encoder.name (resnet8x2)")
    parser.add_argument("--objectives", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    args = parser.parse_args()
    files = ["--data.train", str(args.train), str(args.unlabelled)]
    shape = ("--encoder.name", args.encoder, "--encoder.stem", "cifar-stride2")
    shape += ("--crop.size", str(args.size), "--batch", "256", "--schedule.warmup-epochs", "0.5")
    print(f"{processor()}; {args.minutes:g} minutes on {CORES} cores, then {args.epochs} epochs")
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), dict[str, list[float]]()
        for name in args.objectives:
            recipe, *settings = RUNS[name]
            words = ("pretrain", recipe, *shape, *settings, *files, "--devices", str(CORES))
            words += ("--checkpoint.every-epochs", "0")
            if args.minutes:
                steps = steps_of(words, folder / name, 60 * args.minutes * CORES)
                words += ("--steps", str(steps))
            command([*words, "--out", str(folder / name)])
            found |= judged(name, str(folder / name), args, folder)
        last = folder / args.objectives[-1]
        found |= judged(NONE, f"untrained:{last}", args, folder)
    bar = statistics.mean(found[NONE]) + 2 * statistics.stdev(found[NONE])
    for name, accuracies in found.items():
        if name != NONE:
            beats = statistics.mean(accuracies) > bar
            print(f"{name}: {'more' if beats else 'NOT more'} than two deviations above none")


def judged(
    name: str, source: str, args: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Of all seeds, printed."""
    out = folder / "accuracy.json"
    accuracies = [fine_tuned(source, args, seed, out) for seed in range(args.seeds)]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    shown = " ".join(f"{each:.1f}" for each in accuracies)
    print(f"{name:18} {mean:5.2f} +- {deviation:.2f} %  ({shown})", flush=True)
    return {name: accuracies}


if __name__ == "__main__":
    main()
