"""``widebatch completion SHELL``: a script that completes commands, settings, recipes and files."""

import argparse
import functools
from pathlib import Path
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
    parser.set_defaults(run=functools.partial(run, whole, subparsers))


def run(whole: argparse.ArgumentParser, subparsers: Any, args: argparse.Namespace) -> int:
    """Print the script, which shtab makes of the parsers."""
    import shtab

    from launch import devices, plan_command

    own = argparse.ArgumentParser(add_help=False)
    devices.add_option(own)
    _add_recipes(subparsers.choices["pretrain"], own)
    _add_recipes(subparsers.choices["plan"], plan_command.command_parser())
    _name_files(whole)
    print(shtab.complete(whole, args.shell))
    return ExitCode.DONE


def _add_recipes(command: argparse.ArgumentParser, own: argparse.ArgumentParser) -> None:
    """Add each recipe as a sub-command, with its settings and the command's own options."""
    from trainer.recipes import RECIPES
    from trainer.settings import settings

    recipes = command.add_subparsers(metavar="RECIPE")
    for recipe, build in RECIPES.items():
        parser = recipes.add_parser(recipe, help=recipe, parents=[own])
        for setting in settings(build()):
            if setting.is_switch:
                parser.add_argument(*setting.flags, action="store_true")
            else:
                kind = Path if setting.is_path else str
                parser.add_argument(setting.flag, type=kind, choices=setting.choices or None)


def _name_files(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which words name files: paths, and whatever is no option."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _name_files(command)
        elif not action.choices and (action.type is Path or not action.option_strings):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
