"""``widebatch completion SHELL``: a script that completes commands, settings, recipes and files."""

import argparse
import functools
from typing import Any

from launch.exit_codes import ExitCode

_SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print a script that completes what is typed after `widebatch`: commands, recipes, all settings,
their values, files. Where it goes:

  widebatch completion bash > ~/.local/share/bash-completion/completions/widebatch
  widebatch completion zsh  > ~/.zsh/completions/_widebatch   (with fpath+=~/.zsh/completions
                                                              before compinit in ~/.zshrc)
  widebatch completion fish > ~/.config/fish/completions/widebatch.fish

Writing it takes seconds; using it starts no program.
"""


def add_parser(subparsers: Any, whole: argparse.ArgumentParser) -> None:
    """Add ``completion`` to the command line.

    Args:
        subparsers: of the command line.
        whole: its parser, which tells all commands.
    """
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for bash, zsh or fish",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=functools.partial(run, whole))


def run(whole: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Print the script."""
    from launch.completion import all_commands
    from launch.completion_scripts import WRITERS

    print(WRITERS[args.shell](all_commands(whole)), end="")
    return ExitCode.DONE
