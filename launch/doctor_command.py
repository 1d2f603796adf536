"""``widebatch doctor``: what would go wrong in a run, found out in a minute or two."""

import argparse
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.strict_json import dump_json
from launch import cluster
from launch.devices import add_option
from launch.evaluate_options import add_join_timeout
from launch.exit_codes import ExitCode
from launch.pretrain_command import RECIPES
from trainer.errors import ConfigError

_DESCRIPTION = """\
Examine this machine or cluster for pretraining: versions, FFCV, GPUs, bandwidth between nodes,
clocks, the shared folder, the data file, the loader's rate; and prove, on these very processes,
that loss, BatchNorm, LARS and queue give what one process gives. Start it as you start a run:

  widebatch doctor                                    this machine
  widebatch doctor --devices 8                        this machine, with a process for each GPU
  srun ... widebatch doctor                           all processes of a Slurm job
  widebatch doctor --chaos 10m                        small runs here, disturbed at random and held
                                                      to one that nobody disturbed

Exit code 1 when anything is bad.
"""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="examine machine, cluster and data before a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # of --devices
    )
    add_option(parser)
    parser.add_argument("--data", type=Path, metavar="FILE.beton", help="data file to examine")
    parser.add_argument(
        "--recipe",
        default="simclr-r50",
        choices=sorted(RECIPES),
        metavar="RECIPE",
        help="whose network the loader must keep up with (default simclr-r50)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where runs will go (default .)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here too")
    add_join_timeout(parser)
    parser.add_argument(
        "--chaos",
        type=_duration,
        metavar="TIME",
        help="instead disturb small runs at random for so long (90s, 10m, 1h)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print the table, and say by the exit code whether anything is bad."""
    place = cluster.discover(os.environ)
    if args.chaos is not None and place.world_size > 1:
        raise ConfigError("--chaos starts its processes itself: call it once, without --devices")
    if args.chaos is not None:
        return _chaos(args)
    cluster.export(place)
    if place.rank:
        logging.getLogger().setLevel(logging.WARNING)
    from trainer.doctor.examine import examine
    from trainer.doctor.finding import table

    findings = examine(args.recipe, args.data, args.out, place.node_rank, args.join_timeout)
    if place.rank == 0:
        print(table(findings, place.world_size))
        if args.json is not None:
            records = [{**asdict(finding), "ranks": ranks} for finding, ranks in findings]
            args.json.write_text(dump_json(records, indent=1) + "\n")
    bad = any(finding.verdict == "bad" for finding, _ in findings)
    return ExitCode.FATAL if bad else ExitCode.DONE


def _duration(text: str) -> float:
    """Seconds of a time like 90s, 10m or 1h."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 10m or 1h")
    return float(number) * _UNITS[unit]


def _chaos(args: argparse.Namespace) -> int:
    from launch.chaos.command import chaos

    folder = None if args.out == Path() else args.out
    problems = chaos(args.chaos, args.seed, folder=folder, say=lambda line: print(line, flush=True))
    for problem in problems:
        print(f"BAD: {problem}")
    if args.json is not None:
        args.json.write_text(dump_json({"seed": args.seed, "problems": problems}, indent=1) + "\n")
    return ExitCode.FATAL if problems else ExitCode.DONE
