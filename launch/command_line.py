"""The command line: which command, how errors are told, where lines go.

Commands are imported when they are called, so that ``--help`` answers without loading torch. Every
error that a user can mend is one line on standard error; ``--debug`` shows the traceback,
``--verbose`` what kernels run on.
"""

import argparse
import contextlib
import logging
import os
import select
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from importlib.metadata import version
from typing import TextIO

from common.cores import cores_alone, own_cores
from common.errors import ConfigError
from launch import devices, surroundings
from launch.arguments import Parser
from launch.exit_codes import ExitCode, exit_code_for, is_explained
from launch.preemption import EndAtOnce, say

_DESCRIPTION = """\
Contrastive pretraining of image encoders with very large batches: the same run on any number of
GPUs.
"""
_OURS = ("launch", "trainer", "data_pipeline", "kernels", "common")
_EPILOG = """\
Every command explains itself: widebatch COMMAND --help. Exit codes: 0 done, 1 failed, 2 wrong
usage or bad input, 74 try again, 75 stopped by a signal with a checkpoint written.
"""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    surroundings.make_printable()
    everywhere = [word for word in arguments if word in ("--debug", "--verbose")]
    debug = "--debug" in everywhere
    _configure_logging(verbose="--verbose" in everywhere)
    surroundings.leave_out()
    _obey_quota(os.environ)
    try:
        _check_packages()
        _refuse_empty(arguments)
        words, processes = devices.taken_out([w for w in arguments if w not in everywhere])
        if processes > 1:
            return devices.start([*everywhere, *words], processes)
        return int(_run(words))
    except SystemExit as stop:  # argparse and tyro end the process themselves
        return stop.code if isinstance(stop.code, int) else int(ExitCode.USAGE)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
            return int(ExitCode.UNREAD)
        return int(_report(error, debug))


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end has what it wanted, as ``head`` has."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _run(words: list[str]) -> int:
    # tyro reads the settings of `pretrain`, `plan` and `evaluate`: argparse must not see them.
    if words and words[0] == "pretrain":
        from launch import pretrain_command

        return pretrain_command.main(words[1:])
    with EndAtOnce():
        if words and words[0] == "plan":
            from launch import plan_command

            return plan_command.main(words[1:])
        if words[:1] == ["evaluate"] and words[1:2]:
            from launch import evaluate_command

            if words[1] in evaluate_command.METHODS:
                return evaluate_command.run(words[1], words[2:])
        if words[:1] == ["embed"]:
            from launch import evaluate_command

            return evaluate_command.run("embed", words[1:])
        args = _parser().parse_args(words)
        result: int = args.run(args)
        return result


def _parser() -> argparse.ArgumentParser:
    from launch import (
        completion_command,
        doctor_command,
        evaluate_command,
        export_command,
        pack_command,
        report_command,
        runs_command,
    )

    parser = Parser(
        prog="widebatch",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"widebatch {version('widebatch')}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="say how each kernel is computed here, and why",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    pack_command.add_parser(commands)
    commands.add_parser("plan", help="say whether a run fits a cluster", add_help=False)
    commands.add_parser("pretrain", help="pretrain an encoder by a recipe", add_help=False)
    evaluate_command.add_parser(commands)
    export_command.add_parser(commands)
    report_command.add_parser(commands)
    runs_command.add_parser(commands)
    doctor_command.add_parser(commands)
    completion_command.add_parser(commands, whole=parser)
    return parser


def _check_packages() -> None:
    """Refuse to start when another project's ``kernels`` package shadows ours."""
    import kernels

    if not getattr(kernels, "WIDEBATCH", False):
        raise ImportError(
            f"{kernels.__file__} is another project's package named 'kernels'; install Widebatch in"
            " an environment of its own: make demo, then .venv/bin/widebatch"
        )


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse a word without a letter: as a path it would be the working folder."""
    for before, word in zip(("", *words), words):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            name = name or (before if before.startswith("-") else f"the word after '{before}'")
            raise ConfigError(f"{name} is empty; was a variable of the shell not set?")


def _obey_quota(environ: MutableMapping[str, str]) -> None:
    """Tell torch, before it is imported, of a container's quota: it counts the container's CPUs."""
    if cores_alone() < len(own_cores().cpus):
        environ.setdefault("OMP_NUM_THREADS", str(cores_alone()))


def _configure_logging(verbose: bool) -> None:
    show_time = not sys.stderr.isatty()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s" if show_time else "%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[_AboveBars(sys.stderr)],
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_users)
    if verbose:
        logging.getLogger("kernels").setLevel(logging.DEBUG)


def _is_for_users(record: logging.LogRecord) -> bool:
    """Whether it is ours, or a warning: what other libraries note is for their developers."""
    return record.levelno >= logging.WARNING or _is_ours(record)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OURS


class _AboveBars(logging.StreamHandler[TextIO]):
    """Writes lines above a progress bar that stands on the terminal, and not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        bar = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not loaded: none stands there
        with bar.external_write_mode(self.stream) if bar else contextlib.nullcontext():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Ours are one line each, whatever names stand in them, but for tracebacks."""
        text, one_line = super().format(record), _is_ours(record) and not record.exc_info
        return surroundings.printable(text) if one_line else text


def _report(error: BaseException, debug: bool) -> ExitCode:
    code = exit_code_for(error)
    if code is ExitCode.USAGE and not devices.speaks():
        return code
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    rank = "" if alone else f"[rank {os.environ.get('RANK')}] "
    if debug or not (is_explained(error) or isinstance(error, ImportError)):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
    else:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{rank}widebatch: error: {message}", file=sys.stderr, flush=True)
    return code
