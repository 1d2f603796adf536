"""``widebatch evaluate METHOD``: what an encoder's features are worth, and what they show."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import dump_json
from launch import cluster
from launch.evaluate_labelled import add_finetune, add_knn, add_linear
from launch.evaluate_looks import add_cluster, add_diagnose, add_duplicates, add_retrieve
from launch.evaluate_options import complete
from launch.exit_codes import ExitCode
from trainer.errors import ConfigError

_METHODS = (
    add_knn,
    add_linear,
    add_finetune,
    add_retrieve,
    add_cluster,
    add_diagnose,
    add_duplicates,
)


def add_parser(subparsers: Any) -> None:
    """Add ``evaluate`` and its methods to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure an encoder by labels, look through its eyes",
        description="Each method states its protocol in its JSON, under 'measured'.",
    )
    methods = parser.add_subparsers(title="methods", dest="method", metavar="METHOD", required=True)
    for add in _METHODS:
        add(methods)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the JSON. Other ranks than 0 print nothing."""
    cluster.export(cluster.discover(os.environ))
    chosen = args.json is not None
    complete(args)
    if args.json is not None and args.json.is_dir():
        raise ConfigError(f"--json {args.json}: is a folder; name a file")
    report = args.evaluate(args)
    if report is None:
        return ExitCode.DONE
    if args.json is not None:
        try:
            _write_json(args.json, report)
        except OSError as error:
            if chosen:
                raise
            args.json = None  # somebody else's run
            report["notes"].append(f"the result is not kept: {error}; --json OUT.json keeps it")
    for name, text in args.table(report):
        print(f"{name:<9} {text}")
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    for path in (args.json, getattr(args, "picture", None)):
        if path is not None:
            print(f"written to {path}")
    return ExitCode.DONE


def _write_json(path: Path, report: dict[str, Any]) -> None:
    from data_pipeline.atomic_file import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (dump_json(report, indent=1) + "\n").encode())
