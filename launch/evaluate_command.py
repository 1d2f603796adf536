"""``widebatch evaluate knn|linear``: what a frozen encoder's features are worth."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import cluster
from launch.exit_codes import ExitCode
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.evaluation.evaluate import EvaluateConfig

_SOURCES = """\
RUN_OR_WEIGHTS is one of
  RUN                folder of a pretraining run: its newest checkpoint (--which best: the one with
                     the best online kNN)
  FILE.safetensors   what `widebatch export` wrote, with its JSON beside it
  untrained:RUN      the same architecture with the random weights that the run started from
                     (untrained:FILE.safetensors too): what training is to be compared with
  pixels:SIZE        no encoder: the image itself at SIZE x SIZE pixels, normalised as ImageNet's

Under torchrun or srun the processes share the work; the result is the same on any number.
"""
_KNN = """\
Weighted k nearest neighbours by cosine similarity: each of the k nearest training images votes for
its class with weight exp(similarity / temperature). Exact, deterministic.
"""
_LINEAR = """\
A linear classifier on the frozen encoder. Protocols:
  logistic   multinomial logistic regression on features of centre crops, full batch to convergence,
             L2 of strength C on standardised features; C chosen on held-out training images
  cached     SimCLR's recipe on features of centre crops: SGD with Nesterov momentum, learning rate
             0.1 x batch / 256, cosine to 0, batch 4096, 90 epochs, weight decay 1e-6
  canonical  the same with new random crops and flips of each image in every epoch, through the
             encoder: what published figures use
  auto       logistic where images x features x classes is up to 5e8, else cached; the output says
             which
"""


def add_parser(subparsers: Any) -> None:
    """Add ``evaluate`` and its methods to the command line."""
    parser = subparsers.add_parser(
        "evaluate", help="nearest neighbours or a linear probe on a frozen encoder"
    )
    methods = parser.add_subparsers(title="methods", dest="method", metavar="METHOD", required=True)
    knn = _add_method(methods, "knn", "weighted nearest neighbours", _KNN)
    knn.add_argument("--k", type=int, default=200, help="neighbours that vote (default 200)")
    knn.add_argument("--temperature", type=float, default=0.07, help="of the votes (default 0.07)")
    linear = _add_method(methods, "linear", "linear probe", _LINEAR)
    _add_linear_settings(linear)
    for method in (knn, linear):
        method.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the JSON. Other ranks than 0 print nothing."""
    cluster.export(cluster.discover(os.environ))
    if args.json is not None and args.json.is_dir():
        raise ConfigError(f"--json {args.json}: is a folder; name a file")
    from trainer.evaluation.evaluate import evaluate

    report = evaluate(_config(args))
    if report is None:
        return ExitCode.DONE
    if args.json is not None:
        _write_json(args.json, report)
    print("\n".join(table(report)))
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if args.json is not None:
        print(f"written to {args.json}")
    return ExitCode.DONE


def table(report: dict[str, Any]) -> list[str]:
    """A report's lines for a person; accuracies in percent."""
    encoder, data, settings = report["encoder"], report["data"], report["settings"]
    stem = f" ({encoder['stem']} stem)" if "stem" in encoder else ""
    where = ", ".join(
        f"{name} {encoder[name]:g}" for name in ("step", "epoch") if encoder.get(name) is not None
    )
    crop = f"{report['preprocessing']['size']}-pixel crops"
    few = ""
    if settings.get("labels_per_class"):
        few = f", {settings['labels_per_class']} per class, seed {settings['seed']}"
    top_n = min(5, report["num_classes"])
    rows = [
        ("encoder", f"{encoder['source']}{f', {where}' if where else ''}"),
        ("", f"{encoder['architecture']}{stem}, {encoder['feature_dim']} features, {crop}"),
        ("protocol", _protocol_line(report)),
        ("train", f"{report['n_train']:,} of {data['train']['path']}{few}"),
        ("test", f"{report['n_test']:,} of {data['test']['path']}"),
        ("top-1", f"{100 * report['top1']:.2f} % of {report['num_classes']} classes"),
        (f"top-{top_n}", f"{100 * report['top5']:.2f} %"),
    ]
    return [f"{name:<9} {text}" for name, text in rows]


def _protocol_line(report: dict[str, Any]) -> str:
    settings, protocol = report["settings"], report["protocol"]
    if protocol == "weighted-knn":
        return f"weighted kNN, k {settings['k']}, temperature {settings['temperature']:g}"
    if protocol == "logistic":
        return f"logistic regression, C {settings['c']:g}"
    return (
        f"linear probe ({protocol}): SGD, {settings['epochs']} epochs, "
        f"batch {settings['batch_size']}, learning rate {settings['peak_lr']:g}"
    )


def _add_method(methods: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = methods.add_parser(
        name,
        help=summary,
        description=text,
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_WEIGHTS", help="what to evaluate: see below")
    add(
        "--data.train",
        dest="train",
        type=Path,
        required=True,
        metavar="FILE.beton",
        help="labelled images to learn from",
    )
    add(
        "--data.test",
        dest="test",
        type=Path,
        required=True,
        metavar="FILE.beton",
        help="labelled images to measure on",
    )
    add(
        "--json",
        type=Path,
        metavar="OUT.json",
        help="write the result here: top1, top5 (fractions of 1), n_train, n_test, settings, "
        "encoder, data",
    )
    add(
        "--which",
        choices=("last", "best"),
        default="last",
        help="checkpoint of a run (default last)",
    )
    add(
        "--labels-per-class",
        type=int,
        metavar="N",
        help="use only N labelled training images per class, chosen by the seed (default all)",
    )
    add("--seed", type=int, default=0, help="of that choice, of splits and orders (default 0)")
    add(
        "--size", type=int, metavar="PIXELS", help="side of the centre crop (default the encoder's)"
    )
    add(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="shorter side before the crop (default the encoder's; 8/7 of a new --size above 64)",
    )
    add(
        "--batch",
        type=int,
        default=256,
        metavar="N",
        help="images per process and forward pass (default 256)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="loader threads per process (default 0: its share of the cores)",
    )
    add(
        "--backend",
        choices=("auto", "ffcv", "torchvision"),
        default="auto",
        help="loader (default auto)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp64"),
        default="fp32",
        help="arithmetic of the encoder (default fp32)",
    )
    return parser


def _add_linear_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--protocol",
        choices=("auto", "logistic", "cached", "canonical"),
        default="auto",
        help="see above (default auto)",
    )
    add(
        "--c",
        type=float,
        metavar="C",
        help="logistic: inverse strength of L2, as scikit-learn's (default: chosen)",
    )
    add("--epochs", type=int, default=90, help="cached, canonical: passes (default 90)")
    add(
        "--base-lr",
        type=float,
        default=0.1,
        help="cached, canonical: learning rate per 256 images of a step (default 0.1)",
    )
    add(
        "--linear-batch",
        type=int,
        default=4096,
        metavar="N",
        help="cached, canonical: images per step over all processes (default 4096)",
    )
    add("--weight-decay", type=float, default=1e-6, help="cached, canonical (default 1e-6)")


def _config(args: argparse.Namespace) -> "EvaluateConfig":
    from data_pipeline.loader import LoaderConfig
    from trainer.evaluation.evaluate import EvaluateConfig, KnnConfig
    from trainer.evaluation.linear import LinearConfig
    from trainer.evaluation.logistic import LogisticConfig

    if args.method == "knn":
        method: dict[str, Any] = {"knn": KnnConfig(k=args.k, temperature=args.temperature)}
    else:
        method = {
            "protocol": args.protocol,
            "logistic": LogisticConfig(c=args.c),
            "linear": LinearConfig(
                base_lr=args.base_lr,
                batch_size=args.linear_batch,
                epochs=args.epochs,
                weight_decay=args.weight_decay,
            ),
        }
    same = (
        "source",
        "method",
        "train",
        "test",
        "which",
        "size",
        "resize",
        "batch",
        "device",
        "precision",
        "labels_per_class",
        "seed",
    )
    return EvaluateConfig(
        **{name: getattr(args, name) for name in same},
        loader=LoaderConfig(backend=args.backend, workers=args.workers),
        **method,
    )


def _write_json(path: Path, report: dict[str, Any]) -> None:
    from data_pipeline.atomic_file import AtomicFile

    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(path) as atomic:
        atomic.file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        atomic.publish()
