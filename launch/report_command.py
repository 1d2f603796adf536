"""``widebatch report RUN``: the pictures of a run."""

import argparse
from pathlib import Path
from typing import Any

from launch.exit_codes import ExitCode

_DESCRIPTION = """\
Draw a run as PNG files:

  curves.png      loss, online kNN, learning rate, throughput (metrics.jsonl)
  accuracy.png    what `widebatch evaluate ... --json RUN/evaluation/NAME.json` measured
  views.png       images and the views that training made of them
  neighbours.png  the nearest training images of test images, by pixels and by the encoder
  map.png         test images on a plane, by pixels and by the encoder (t-SNE)
  overview.png    the best of these in one picture

What a run has no data for is left out, and said. Encoder and data are looked at on this machine;
a run that is still going on can be drawn too.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``report`` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="draw a run's curves, accuracies, views, neighbours and map",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a pretraining run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the figures (default RUN/figures)"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=1000,
        metavar="N",
        help="images of each data set to put through the encoder (default 1000)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and say which files were written."""
    from trainer.report import ReportConfig, write_figures

    config = ReportConfig(max_images=args.max_images, device=args.device)
    out = args.out or args.run_folder / "figures"
    for path in write_figures(args.run_folder, out, config):
        print(path)
    return ExitCode.DONE
