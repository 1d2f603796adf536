"""``widebatch doctor``: what would go wrong in a run, found out in a minute or two."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.files.atomic_file import check_replaceable, write_atomically
from common.files.strict_json import dump_json
from launch import cluster
from launch.devices import add_option
from launch.exit_codes import ExitCode
from launch.settings_arguments import recipes

_DESCRIPTION = """\
Examine this machine or cluster for pretraining: versions, FFCV, GPUs, bandwidth between nodes,
clocks, the shared folder, the data file, the loader's rate; and prove, on these very processes,
that loss, BatchNorm, LARS and queue give what one process gives. Start it as you start a run:

  widebatch doctor                                    this machine
  widebatch doctor --devices 8                        this machine, with a process for each GPU
  srun ... widebatch doctor                           all processes of a Slurm job

Exit code 1 when anything is bad.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="examine machine, cluster and data before a run",
        description=_DESCRIPTION,
        allow_abbrev=False,  # of --devices
    )
    add_option(parser)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE.beton", help="data to examine"
    )
    parser.add_argument(
        "--recipe",
        default="simclr-r50",
        choices=sorted(recipes()),
        metavar="RECIPE",
        help="whose network the loader must keep up with (default simclr-r50)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where runs will go (default .)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings here too")
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=120.0,  # common.rendezvous.JOIN_TIMEOUT; a test holds it to that
        metavar="SECONDS",
        help="wait so long for the other processes (default 120; 0: for ever)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print what is found as it is, and say by the exit code whether anything is bad."""
    if args.json is not None:
        check_replaceable(args.json, ".json")
    place = cluster.take_place()
    from trainer.doctor.examine import examine
    from trainer.doctor.finding import table

    records: list[dict[str, Any]] = []
    for found in examine(args.recipe, args.data, args.out, place.node_rank, args.join_timeout):
        records.append({**asdict(found[0]), "ranks": found[1]})
        if place.rank == 0:
            print(table([found], place.world_size), flush=True)
    if place.rank == 0 and args.json is not None:
        write_atomically(args.json, (dump_json(records, indent=1) + "\n").encode())
    bad = any(record["verdict"] == "bad" for record in records)
    return ExitCode.FATAL if bad else ExitCode.DONE
