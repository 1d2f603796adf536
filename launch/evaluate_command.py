"""``widebatch evaluate METHOD``: what an encoder's features are worth, and what they show."""

import dataclasses
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from common.errors import ConfigError
from common.files.atomic_file import write_atomically
from common.files.strict_json import dump_json, read_json_file
from launch import cluster
from launch import evaluate_tables as tables
from launch.exit_codes import ExitCode
from launch.settings_arguments import parse
from launch.surroundings import printable
from trainer.state.run_data import NoDataError, run_data, stored_paths

if TYPE_CHECKING:
    from trainer.evaluation.job import JobConfig


class Method(NamedTuple):
    """What is measured or looked at, by the function of its name: see :func:`evaluation_by`."""

    summary: str
    table: Callable[[tables.Report], tables.Rows]
    """Gives a report's lines for a person."""


METHODS = {
    "knn": Method("weighted nearest neighbours", tables.labelled),
    "linear": Method("linear probe", tables.labelled),
    "finetune": Method("train on with few labels or many", tables.labelled),
    "targets": Method("several labels of an image, or numbers", tables.targets),
    "retrieve": Method("more images like these", tables.retrieve),
    "cluster": Method("k-means, NMI and ARI", tables.cluster),
    "diagnose": Method("collapse, spread: no labels needed", tables.diagnose),
    "duplicates": Method("duplicates and false negatives", tables.duplicates),
}
EMBED = Method("write an encoder's features of images to a file", tables.embed)
"""``widebatch embed``, which is called as they are."""
THE_RUNS = (Path("from-the-run"),)
_SOURCES = """\
RUN_OR_WEIGHTS is one of
  RUN                folder of a pretraining run: its newest checkpoint (--which best: the one with
                     the best online kNN)
  FILE.safetensors   what `widebatch export` wrote, with its JSON beside it
  average:RUN        the moving average of that encoder, which BYOL, DINO and MoCo keep
  untrained:RUN      the same architecture with the random weights that the run started from
                     (untrained:FILE.safetensors too): what training is to be compared with
  pixels:SIZE        no encoder: the image itself at SIZE x SIZE pixels, normalised as ImageNet's

Several processes share the work (--devices N starts N of this machine, one for each GPU; torchrun,
srun); the result is the same on any number.
"""
# Settings that do not change a result.
_OF_NO_EFFECT = (
    *("batch", "loader.workers", "loader.backend", "loader.prefetch", "device", "join_timeout"),
    *("json", "picture", "pictured", "out"),
)
_LONGEST = 120  # letters of a file's name


def add_parser(subparsers: Any) -> None:
    """Add ``evaluate`` and its methods to the command line; their settings are tyro's to read."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure an encoder by labels, look through its eyes",
        description="Each method states its protocol in its JSON, under 'measured'.",
    )
    methods = parser.add_subparsers(title="methods", metavar="METHOD", required=True)
    for name, method in METHODS.items():
        methods.add_parser(name, help=method.summary, add_help=False)
    subparsers.add_parser("embed", help=EMBED.summary, add_help=False)


def evaluation_by(name: str) -> Callable[["JobConfig"], tables.Report | None]:
    """``trainer.evaluation.NAME.NAME``: a report, or None on other ranks than 0; imports torch."""
    function: Callable[[JobConfig], tables.Report | None] = getattr(
        importlib.import_module(f"trainer.evaluation.{name}"), name
    )
    return function


def default_settings(name: str) -> "JobConfig":
    """The settings of a method that the command line changes."""
    import tyro

    kind = get_type_hints(evaluation_by(name))["config"]
    data = {f.name: THE_RUNS for f in dataclasses.fields(kind) if f.name in ("train", "test")}
    config: JobConfig = kind(source=tyro.MISSING, **data)
    return config


def run(name: str, words: Sequence[str]) -> ExitCode:
    """Evaluate by the method of this name, print a table, write the JSON.

    Other ranks than 0 print nothing.
    """
    default, method = default_settings(name), METHODS.get(name, EMBED)
    given = parse(
        f"widebatch {'' if method is EMBED else 'evaluate '}{name}",
        default,
        words,
        text=f"{inspect.getdoc(type(default))}\n\n{_SOURCES}",
        other_options=["--devices"],
    )
    cluster.take_place()
    config = _completed(name, default, given)
    report = evaluation_by(name)(config)
    if report is None:
        return ExitCode.DONE
    written = [config.json, getattr(config, "picture", None)]
    if method is EMBED:
        written = list(map(Path, report["files"]))
    if config.json is not None and method is not EMBED:  # which has written it
        try:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.json, (dump_json(report, indent=1) + "\n").encode())
        except OSError as error:
            if given.json is not None:
                raise
            del written[0]  # somebody else's run
            report["notes"].append(f"the result is not kept: {error}; --json OUT.json keeps it")
    for title, text in method.table(report):
        print(printable(f"{title:<9} {text}"))
    for note in report["notes"]:
        print(printable(f"note: {note}"), file=sys.stderr)
    for path in filter(None, written):
        print(printable(f"written to {path}"))
    return ExitCode.DONE


def _completed(method: str, default: "JobConfig", config: "JobConfig") -> "JobConfig":
    """Fill in what the run says where the command line does not: its data, a file for the result.

    Raises:
        ConfigError: nothing is there; or a data file is not named, and no run has it.
        DataError: the weights, the run's config.json or its data cannot be read.
    """
    from trainer.evaluation.load_encoder import run_of

    run = run_of(config.source)
    settings = {} if run is None else read_json_file(run / "config.json")
    found: dict[str, Any] = {}
    for name in ("train", "test"):
        if getattr(config, name, None) != THE_RUNS:
            continue
        if run is None:
            raise ConfigError(
                f"{method}: {_option(method, name)} FILE.beton is missing, and {config.source}"
                " is no run that names it"
            )
        try:
            found[name] = run_data(run, settings, name)
        except NoDataError as error:
            option = _option(method, name)
            raise ConfigError(f"{run}: {error}; name the file by {option}") from None
    if config.json is None and run is not None and method != "embed":
        found["json"] = run / "evaluation" / _file_name(method, default, config, settings)
    return dataclasses.replace(config, **found)


def _option(method: str, name: str) -> str:
    return "--data" if method == "embed" else f"--data.{name}"


def _file_name(method: str, default: "JobConfig", config: "JobConfig", settings: Any) -> str:
    """Of the result: another one for each encoder, data and setting, the same for the same."""
    from trainer.state.settings import changed_from

    words, shown = [method], list[list[str]]()
    if not Path(config.source).exists():
        words.append(config.source.partition(":")[0])
    for setting in changed_from(default, config):
        usual = stored_paths(settings, setting.key) if setting.is_path else []
        value = setting.value
        if setting.key in _OF_NO_EFFECT or (
            isinstance(value, tuple) and usual and usual == [Path(v).absolute() for v in value]
        ):
            continue
        values = value if isinstance(value, tuple) else (value,)
        shown.append(
            [setting.key, *(str(v.absolute() if isinstance(v, Path) else v) for v in values)]
        )
        words += [setting.key, *(v.stem if isinstance(v, Path) else str(v) for v in values)]
    name = re.sub(r"[^\w.]+", "-", "-".join(words))
    if len(name) > _LONGEST or any(key in ("train", "test") for key, *_ in shown):
        # Files in two folders may have one name, and what is cut off may be what differs.
        digest = hashlib.sha256(dump_json(shown).encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST - 9]}-{digest}"
    return f"{name}.json"
