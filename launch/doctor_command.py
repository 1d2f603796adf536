"""``widebatch doctor``: what would go wrong in a run, found out in a minute or two."""

import argparse
import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import cluster
from launch.exit_codes import ExitCode
from launch.pretrain_command import RECIPES

_DESCRIPTION = """\
Examine this machine or cluster for pretraining: versions, FFCV, GPUs, bandwidth between nodes,
clocks, the shared folder, the data file, the loader's rate; and prove, on these very processes,
that loss, BatchNorm, LARS and queue give what one process gives. Start it as you start a run:

  widebatch doctor                                    this machine
  widebatch doctor --distributed                      this machine, with a process per GPU (or two)
  torchrun --nproc-per-node 8 -m launch doctor        all processes of a torchrun job
  srun ... python -m launch doctor                    all processes of a Slurm job

Exit code 1 when anything is bad.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="examine machine, cluster and data before a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--distributed", action="store_true", help="start several processes here, if alone"
    )
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine, print the table, and say by the exit code whether anything is bad."""
    place = cluster.discover(os.environ)
    if args.distributed and place.launcher == "single":
        return _start_several()
    cluster.export(place)
    if place.rank:
        logging.getLogger().setLevel(logging.WARNING)
    from trainer.doctor.examine import examine
    from trainer.doctor.finding import table

    findings = examine(args.recipe, args.data, args.out, place.node_rank)
    if place.rank == 0:
        print(table(findings, place.world_size))
        if args.json is not None:
            records = [{**asdict(finding), "ranks": ranks} for finding, ranks in findings]
            args.json.write_text(json.dumps(records, indent=1) + "\n")
    bad = any(finding.verdict == "bad" for finding, _ in findings)
    return ExitCode.FATAL if bad else ExitCode.DONE


def _start_several() -> int:
    import torch

    processes = torch.cuda.device_count() or 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "launch", *sys.argv[1:]]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, check=False, env=environment).returncode
