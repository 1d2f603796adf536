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
    """Add ``completion`` to the command line, whose parser is ``whole``."""
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for bash, zsh or fish",
        description=_DESCRIPTION,
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(run=functools.partial(run, whole, subparsers))


def run(whole: argparse.ArgumentParser, subparsers: Any, args: argparse.Namespace) -> int:
    """Print the script, which shtab makes of the parsers."""
    import shtab

    from launch import devices, evaluate_command, plan_command
    from trainer.recipes import RECIPES

    own = argparse.ArgumentParser(add_help=False)
    devices.add_option(own)
    for command, options in (("pretrain", own), ("plan", plan_command.command_parser())):
        recipes = subparsers.choices[command].add_subparsers(metavar="RECIPE")
        for recipe, build in RECIPES.items():
            _add_settings(recipes.add_parser(recipe, help=recipe, parents=[options]), build())
    evaluations = _below(subparsers.choices["evaluate"])
    for name, parser in {**evaluations, "embed": subparsers.choices["embed"]}.items():
        devices.add_option(parser)
        parser.add_argument("source")
        _add_settings(parser, evaluate_command.default_settings(name))
    _name_files(whole)
    print(shtab.complete(whole, args.shell))
    return ExitCode.DONE


def _add_settings(parser: argparse.ArgumentParser, config: Any) -> None:
    """Add the settings of a configuration, which else tyro reads."""
    from trainer.state.settings import settings

    for setting in settings(config):
        if setting.is_switch:
            parser.add_argument(*setting.flags, action="store_true")
        else:
            kind = Path if setting.is_path else str
            parser.add_argument(setting.flag, type=kind, choices=setting.choices or None)


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of its sub-commands."""
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: below for action in actions for name, below in action.choices.items()}


def _name_files(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which words name files: paths, and whatever is no option."""
    import shtab

    for below in _below(parser).values():
        _name_files(below)
    for action in parser._actions:
        if not action.choices and (action.type is Path or not action.option_strings):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
