"""What all methods of ``widebatch evaluate`` ask for: the encoder, its images, where to compute."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import read_json_file
from launch.devices import add_option
from trainer.errors import ConfigError
from trainer.run_data import NoDataError, run_data

Report = dict[str, Any]
Rows = list[tuple[str, str]]

# Options that do not change a result, and what is no option.
_OF_NO_EFFECT = (
    *("batch", "workers", "backend", "device", "picture", "pictured", "debug", "verbose"),
    *("source", "method", "json", "run", "parser", "evaluate", "table", "join_timeout"),
    "devices",
)
_LONGEST = 120  # letters of a file's name

SOURCES = """\
RUN_OR_WEIGHTS is one of
  RUN                folder of a pretraining run: its newest checkpoint (--which best: the one with
                     the best online kNN)
  FILE.safetensors   what `widebatch export` wrote, with its JSON beside it
  untrained:RUN      the same architecture with the random weights that the run started from
                     (untrained:FILE.safetensors too): what training is to be compared with
  pixels:SIZE        no encoder: the image itself at SIZE x SIZE pixels, normalised as ImageNet's

Several processes (--devices N, torchrun, srun) share the work; the result is the same on any
number.
"""


def add_method(
    methods: Any,
    name: str,
    summary: str,
    text: str,
    *,
    train: str,
    evaluate: Callable[[argparse.Namespace], Report | None],
    table: Callable[[Report], Rows],
) -> argparse.ArgumentParser:
    """A method's parser with the options that all have.

    Args:
        methods: the sub-parsers that it joins.
        name: of the method.
        summary: of it, a few words.
        text: about it, for its ``--help``.
        train: what the images of ``--data.train`` are for.
        evaluate: gives the report; None on other ranks than 0.
        table: gives a report's lines for a person.
    """
    parser: argparse.ArgumentParser = methods.add_parser(
        name,
        help=summary,
        description=text,
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_WEIGHTS", help="what to evaluate: see below")
    add(
        "--json",
        type=Path,
        metavar="OUT.json",
        help="where the result goes, with its protocol (default a file in RUN/evaluation)",
    )
    add(
        "--which",
        choices=("last", "best"),
        default="last",
        help="checkpoint of a run (default last)",
    )
    add("--seed", type=int, default=0, help="of all that is chosen or drawn (default 0)")
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
    add_option(parser)
    add_join_timeout(parser)
    add_file(parser, "train", train)
    parser.set_defaults(evaluate=evaluate, table=table, parser=parser)
    return parser


def add_join_timeout(parser: argparse.ArgumentParser) -> None:
    """How long processes of one command wait for each other."""
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=120.0,  # trainer.rendezvous.JOIN_TIMEOUT; a test holds it to that
        metavar="SECONDS",
        help="wait so long for the other processes (default 120; 0: for ever)",
    )


def add_file(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """A data file, as ``--data.NAME``; a run knows its own."""
    text = f"{text} (default the run's)"
    parser.add_argument(f"--data.{name}", dest=name, type=Path, metavar="FILE.beton", help=text)


def complete(args: argparse.Namespace) -> None:
    """Fill in what the run says where the command line does not: its data, a file for the result.

    Raises:
        ConfigError: a data file is not named, and no run has it.
        DataError: the run's config.json or its data cannot be read.
    """
    run = run_of(args.source)
    settings = {} if run is None else read_json_file(run / "config.json")
    for name in ("train", "test"):
        if getattr(args, name, Path()) is not None:
            continue
        if run is None:
            raise ConfigError(
                f"evaluate {args.method}: --data.{name} FILE.beton is missing, and {args.source}"
                " is no run that names it"
            )
        try:
            setattr(args, name, run_data(run, settings, name))
        except NoDataError as error:
            raise ConfigError(f"{run}: {error}; name the file by --data.{name}") from None
    if args.json is None and run is not None:
        args.json = run / "evaluation" / _file_name(args, settings.get("data"))


def run_of(source: str) -> Path | None:
    """The run that a source names, trained or untrained; None where it is no run."""
    run = Path(source if Path(source).exists() else source.removeprefix("untrained:"))
    return run if (run / "config.json").is_file() else None


def _file_name(args: argparse.Namespace, data: object) -> str:
    """Of the result: another one for each encoder, data and setting, the same for the same."""
    words = [args.method]
    if not Path(args.source).exists():
        words.append("untrained")
    for name, value in vars(args).items():
        if name in _OF_NO_EFFECT or value == args.parser.get_default(name):
            continue
        usual = data.get(name) if isinstance(data, dict) else None
        if isinstance(value, Path) and usual == str(value.absolute()):
            continue
        values = value if isinstance(value, list) else [value]
        words += [name, *(v.stem if isinstance(v, Path) else str(v) for v in values)]
    return re.sub(r"[^\w.]+", "-", "-".join(words))[:_LONGEST] + ".json"


def add_picture(parser: argparse.ArgumentParser, what: str) -> None:
    """Where a method draws, and how much."""
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help=f"draw {what} here")
    parser.add_argument(
        "--pictured", type=int, default=10, metavar="N", help="rows of the picture (default 10)"
    )


def job_settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The settings of ``trainer.evaluation.job.JobConfig``, and those of ``names``."""
    from data_pipeline.loader import LoaderConfig

    same = ("source", "which", "size", "resize", "batch", "device", "precision", "seed")
    return {
        **{name: getattr(args, name) for name in (*same, "join_timeout", *names)},
        "loader": LoaderConfig(backend=args.backend, workers=args.workers),
    }


def shown(paths: str) -> str:
    """Paths as they are seen from the working folder."""
    return paths.replace(f"{Path.cwd()}/", "")


def head_rows(report: Report) -> Rows:
    """The first lines of every table: which encoder."""
    encoder = report["encoder"]
    stem = f" ({encoder['stem']} stem)" if "stem" in encoder else ""
    where = ", ".join(
        f"{name} {encoder[name]:g}" for name in ("step", "epoch") if encoder.get(name) is not None
    )
    crop = f"{report['preprocessing']['size']}-pixel crops"
    return [
        ("encoder", f"{shown(encoder['source'])}{f', {where}' if where else ''}"),
        ("", f"{encoder['architecture']}{stem}, {encoder['feature_dim']} features, {crop}"),
    ]
