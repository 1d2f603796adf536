"""``widebatch evaluate knn|linear|finetune``: accuracy by labels."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluate_options import (
    Report,
    Rows,
    add_file,
    add_method,
    head_rows,
    job_settings,
    shown,
)
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.evaluation.evaluate_config import EvaluateConfig

_KNN = """\
Weighted k nearest neighbours by cosine similarity: each of the k nearest training images votes for
its class with weight exp(similarity / temperature). Exact, deterministic. Of several k, found in
one pass, the first is the result and all are in the JSON as by_k.
"""
_LINEAR = """\
A linear classifier on the frozen encoder. Protocols:
  logistic   multinomial logistic regression on features of centre crops, full batch to convergence,
             L2 of strength C on standardised features; C chosen on held-out training images
  cached     SimCLR's recipe on features of centre crops: SGD with Nesterov momentum, learning rate
             0.1 x batch / 256, cosine to 0, batch 4096, 90 epochs, weight decay 1e-6
  sweep      the same for every --base-lr with every --weight-decay at once, one matrix product for
             all; the best on held-out training images is trained again on all of them
  canonical  as cached with new random crops and flips of each image in every epoch, through the
             encoder: what published figures use
  auto       logistic where images x features x classes is up to 5e8, else cached; the output says
             which

--preset simclr-imagenet is SimCLR's protocol for ImageNet with all its values: canonical, 90
epochs, batch 4096, learning rate 1.6, weight decay 1e-6, crops of 224 pixels (of 256 at the test).
"""
_FINETUNE = """\
Trains the encoder on, with a linear classifier of zeros on top, by SimCLR's recipe: SGD with
Nesterov momentum, learning rate 0.05 x batch / 256, cosine to 0, no weight decay, random crops and
flips, BatchNorm statistics of the global batch. Tested on centre crops.

With 1 % of the labels (--labels 0.01) or 10 %, chosen class by class by the seed, or those of
--label-list: a text file with a sample id or the name of a packed image file in each line, such as
SimCLR's imagenet_subsets/1percent.txt. The JSON lists the ids that were used.
--head-layers 1 keeps the first layer of the run's projection head (SimCLR v2).
"""
_OF_PRESETS = ("epochs", "base_lr", "linear_batch", "weight_decay", "size", "resize", "c")


def add_knn(methods: Any) -> None:
    """``evaluate knn``."""
    parser = _add_cached(methods, "knn", "weighted nearest neighbours", _KNN)
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=[200], help="neighbours that vote (default 200)")
    add("--temperature", type=float, default=0.07, help="of the votes (default 0.07)")


def add_linear(methods: Any) -> None:
    """``evaluate linear``."""
    parser = _add_cached(methods, "linear", "linear probe", _LINEAR)
    add = parser.add_argument
    add(
        "--protocol",
        choices=("auto", "logistic", "cached", "sweep", "canonical"),
        default="auto",
        help="see above (default auto)",
    )
    add("--preset", choices=("simclr-imagenet",), help="a published protocol with all its values")
    add(
        "--c",
        type=float,
        metavar="C",
        help="logistic: inverse strength of L2, as scikit-learn's (default: chosen)",
    )
    add("--epochs", type=int, help="cached, sweep, canonical: passes (default 90)")
    add(
        "--base-lr",
        type=float,
        nargs="+",
        help="cached, canonical: learning rate per 256 images of a step (default 0.1); sweep: "
        "those to try (default 0.003 to 30)",
    )
    add(
        "--linear-batch",
        type=int,
        metavar="N",
        help="cached, sweep, canonical: images per step over all processes (default 4096)",
    )
    add(
        "--weight-decay",
        type=float,
        nargs="+",
        help="cached, canonical (default 1e-6); sweep: those to try (default 0, 1e-6, 1e-5, 1e-4)",
    )


def add_finetune(methods: Any) -> None:
    """``evaluate finetune``."""
    parser = _add_labelled(
        methods, "finetune", "train on with few labels or many", _FINETUNE, _finetune
    )
    add = parser.add_argument
    add("--labels", type=float, default=1.0, metavar="SHARE", help="of the labels (default 1)")
    add("--label-list", type=Path, metavar="FILE.txt", help="the labelled samples, one a line")
    add("--images", type=Path, metavar="FOLDER", help="what was packed (default as it was then)")
    add("--head-layers", type=int, default=0, metavar="N", help="of the head (default 0)")
    add("--epochs", type=int, help="passes (default 30; 60 below 5 %% of the labels)")
    add("--base-lr", type=float, help="learning rate per 256 images of a step (default 0.05)")
    add(
        "--tuning-batch",
        type=int,
        metavar="N",
        help="images per step over all processes (default 1024)",
    )
    add("--weight-decay", type=float, help="(default 0)")


def _add_labelled(
    methods: Any,
    name: str,
    summary: str,
    text: str,
    evaluate: Callable[[argparse.Namespace], Report | None],
) -> argparse.ArgumentParser:
    train = "labelled images to learn from"
    parser = add_method(methods, name, summary, text, train=train, evaluate=evaluate, table=table)
    add_file(parser, "test", "labelled images to measure on")
    return parser


def _add_cached(methods: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    """A method on features that are computed once."""
    parser = _add_labelled(methods, name, summary, text, _evaluate)
    parser.add_argument(
        "--labels-per-class",
        type=int,
        metavar="N",
        help="use only N labelled training images per class, chosen by the seed (default all)",
    )
    return parser


def _evaluate(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.evaluate import evaluate

    return evaluate(_config(args))


def _finetune(args: argparse.Namespace) -> Report | None:
    from trainer.evaluation.classifier import TuningConfig
    from trainer.evaluation.finetune import FinetuneConfig, finetune

    given = {name: getattr(args, name) for name in ("epochs", "base_lr", "weight_decay")}
    given["batch_size"] = args.tuning_batch
    tuning = TuningConfig(**{k: v for k, v in given.items() if v is not None})
    names = ("train", "test", "labels", "label_list", "images", "head_layers")
    return finetune(FinetuneConfig(**job_settings(args, *names), tuning=tuning))


def _config(args: argparse.Namespace) -> "EvaluateConfig":
    from trainer.evaluation.evaluate_config import EvaluateConfig, KnnConfig

    if args.method == "knn":
        method: dict[str, Any] = {"knn": KnnConfig(k=tuple(args.k), temperature=args.temperature)}
    else:
        method = _linear_settings(args)
    same = job_settings(args, "method", "train", "test", "labels_per_class")
    return EvaluateConfig(**same, **method)


def _linear_settings(args: argparse.Namespace) -> dict[str, Any]:
    from trainer.evaluation.linear import LinearConfig
    from trainer.evaluation.logistic import LogisticConfig

    if args.preset is not None:
        _check_preset(args)
        return {"preset": args.preset, "protocol": "canonical"}
    several = {"base_lrs": args.base_lr, "weight_decays": args.weight_decay}
    given = {"epochs": args.epochs, "batch_size": args.linear_batch}
    if args.protocol != "sweep":
        for option, values in (("--base-lr", args.base_lr), ("--weight-decay", args.weight_decay)):
            if values and len(values) > 1:
                raise ConfigError(f"{option}: several values go with --protocol sweep")
        given["base_lr"] = args.base_lr and args.base_lr[0]
        given["weight_decay"] = None if args.weight_decay is None else args.weight_decay[0]
        several = {}
    return {
        "protocol": args.protocol,
        "logistic": LogisticConfig(c=args.c),
        "linear": LinearConfig(**{k: v for k, v in given.items() if v is not None}),
        **{name: tuple(values) for name, values in several.items() if values is not None},
    }


def _check_preset(args: argparse.Namespace) -> None:
    if args.protocol not in ("auto", "canonical"):
        raise ConfigError(f"--preset {args.preset} is canonical: leave out --protocol")
    for name in _OF_PRESETS:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"--preset {args.preset} says what {option} is: leave it out")


def table(report: Report) -> Rows:
    """A report's lines for a person; accuracies in percent."""
    data, settings = report["data"], report["settings"]
    few = ""
    if settings.get("labels_per_class"):
        few = f", {settings['labels_per_class']} per class, seed {settings['seed']}"
    top_n = min(5, report["num_classes"])
    rows = [
        *head_rows(report),
        ("protocol", _protocol_line(report)),
        ("train", f"{report['n_train']:,} of {shown(data['train']['path'])}{few}"),
        ("test", f"{report['n_test']:,} of {shown(data['test']['path'])}"),
        ("top-1", f"{100 * report['top1']:.2f} % of {report['num_classes']} classes"),
        (f"top-{top_n}", f"{100 * report['top5']:.2f} %"),
    ]
    if len(report.get("by_k", ())) > 1:
        rows += [
            (f"k {each['k']}", f"{100 * each['top1']:.2f} %, {100 * each['top5']:.2f} %")
            for each in report["by_k"]
        ]
    return rows


def _protocol_line(report: Report) -> str:
    settings, protocol = report["settings"], report["protocol"]
    if protocol == "weighted-knn":
        return f"weighted kNN, k {settings['k']}, temperature {settings['temperature']:g}"
    if protocol == "logistic":
        return f"logistic regression, C {settings['c']:g}"
    if protocol == "finetune":
        kept = settings["head_layers"]
        with_head = f" with {kept} layer{'s' * (kept > 1)} of its head" if kept else ""
        return (
            f"fine-tuned{with_head}: SGD, {settings['epochs']} epochs, "
            f"batch {settings['batch_size']}, learning rate {settings['peak_lr']:g}"
        )
    best = f"best of {len(report['trials'])}, " if protocol == "sweep" else ""
    return (
        f"linear probe ({protocol}): {best}SGD, {settings['epochs']} epochs, "
        f"batch {settings['batch_size']}, learning rate {settings['peak_lr']:g}"
    )
