"""``widebatch report RUN ...``: a run, or several side by side, as one page."""

import argparse
import logging
from pathlib import Path
from typing import Any

from common.bounds import check_bounds
from common.errors import ConfigError
from common.files.atomic_file import check_replaceable
from launch.exit_codes import ExitCode

log = logging.getLogger(__name__)

_DESCRIPTION = """\
Make one HTML page of a run: curves, where the step's time went, evaluations, augmented views,
nearest neighbours, a map of the embeddings, similarities of pairs, and the settings beside the
recipe's. It needs no network and no other file. What a run has no data for is left out, and said.

A run that is still going on has a page too; --live serves one on this machine that follows it.
Several runs are compared: their curves in the same axes, their final numbers, their settings.

--figures DIR also draws PNG files: curves, accuracy, views, neighbours, map, and overview.png with
the best of these.
"""
_SECONDS = 3.0  # between two looks of a live page at its run


def add_parser(subparsers: Any) -> None:
    """Add ``report`` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="make one page of a run, or of several: curves, views, neighbours, map, settings",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "run_folders", metavar="RUN", nargs="+", type=Path, help="folder of a pretraining run"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE",
        help="the page (default RUN/report.html; of several runs ./report.html)",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw PNG files into DIR too (of one run)"
    )
    parser.add_argument(
        "--live", action="store_true", help="serve a page that follows the run, until Ctrl-C"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the live page on 127.0.0.1 (default: a free one)"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=1000,
        metavar="N",
        help="images of each data set to put through the encoder (default 1000)",
    )
    parser.add_argument(
        "--device",
        help="auto, cpu, cuda or cuda:N (default auto; cpu for --live, which leaves the GPU to the"
        " run)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the page, and say which files were written; or serve it."""
    _check(args)
    return _serve(args) if args.live else _write(args)


def _check(args: argparse.Namespace) -> None:
    if args.live and (args.out or args.figures):
        raise ConfigError("--live writes no files: leave out --out and --figures")
    if args.figures and len(args.run_folders) > 1:
        raise ConfigError("--figures draws one run: name one")
    if args.out:
        check_replaceable(args.out, ".html")
    if args.port and not args.live:
        raise ConfigError("--port is of a live page: add --live")
    check_bounds(args, "--", max_images="[1, 1e9]", port="[0, 65535]")


def _write(args: argparse.Namespace) -> int:
    from trainer.report.contents import read_contents
    from trainer.report.page import page, write_page
    from trainer.report.pictures import COMPARED, make_pictures
    from trainer.report.png import write_figures
    from trainer.state.run_data import read_settings

    runs, pictures = args.run_folders, COMPARED
    settings = [read_settings(run) for run in runs]
    if len(runs) == 1:
        pictures = make_pictures(
            runs[0], settings[0], max_images=args.max_images, device=args.device or "auto"
        )
    told = read_contents(runs, pictures)
    for contents in told:
        for part, why in contents.missing:
            log.info("left out: %s (%s)", part, why)
    out = args.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_page(out, page(told))
    print(out)
    if args.figures:
        for path in write_figures(told[0], args.figures):
            print(path)
    return ExitCode.DONE


def _serve(args: argparse.Namespace) -> int:
    from launch.report_server import PageServer
    from trainer.report.charts import PLOTLY
    from trainer.report.live import LiveReport
    from trainer.report.page import content_security_policy

    report = LiveReport(
        args.run_folders, _SECONDS, max_images=args.max_images, device=args.device or "cpu"
    )
    try:
        server = PageServer(args.port, report.page, PLOTLY, content_security_policy(live=True))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--port {args.port}: {reason}; choose another") from None
    with server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the way to end it: no failure
            print()
    return ExitCode.DONE
