"""What can be written after ``widebatch``: all commands with their words, for a shell's completion.

The words are collected once, when the script is written. The settings of recipes take torch for
that; at TAB nothing of this program runs.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.pretrain_command import RECIPES

FILE, SWITCH, VALUE = "file", "switch", "value"


@dataclass(frozen=True)
class Option:
    """An option, and what follows it: a file, one of several words, nothing, or anything."""

    names: tuple[str, ...]
    kind: str = VALUE
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command or sub-command and what may follow it."""

    path: str
    """``evaluate/knn``; empty for ``widebatch`` itself."""
    options: tuple[Option, ...] = ()
    words: tuple[str, ...] = ()
    """Sub-commands, recipes, or what a positional argument may be."""
    files: bool = False
    """Whether positional arguments are files or folders."""
    below: tuple["Command", ...] = field(default=(), repr=False)

    def walk(self) -> Iterator["Command"]:
        """This one and all below it."""
        yield self
        for command in self.below:
            yield from command.walk()


def all_commands(parser: argparse.ArgumentParser) -> list[Command]:
    """Every command, those of ``parser`` and the recipes with their settings."""
    top = _of_parser(parser, "")
    recipes = {
        "pretrain": _of_recipes("pretrain", (Option(("--devices",)),)),
        "plan": _of_recipes("plan", _plan_options()),
    }
    below = tuple(recipes.get(command.path, command) for command in top.below)
    return list(dataclasses.replace(top, below=below).walk())


def _of_parser(parser: argparse.ArgumentParser, path: str) -> Command:
    options, words, below, files = [], [], [], False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += list(action.choices)
            for name, inner in action.choices.items():
                below.append(_of_parser(inner, f"{path}/{name}".lstrip("/")))
        elif action.option_strings:
            options.append(_option(action))
        elif action.choices:
            words += [str(choice) for choice in action.choices]
        else:
            files = True
    return Command(path, tuple(options), tuple(words), files, tuple(below))


def _option(action: argparse.Action) -> Option:
    names = tuple(action.option_strings)
    if action.nargs == 0:
        return Option(names, SWITCH)
    kind = FILE if action.type is Path else VALUE
    return Option(names, kind, tuple(str(choice) for choice in action.choices or ()))


def _plan_options() -> tuple[Option, ...]:
    from launch import plan_command

    options = _of_parser(plan_command.command_parser(), "plan").options
    gpus = Option(("--gpu",), VALUE, plan_command.GPUS)
    return (gpus, *(option for option in options if option.names != gpus.names))


def _of_recipes(command: str, own: tuple[Option, ...]) -> Command:
    from trainer.recipes import RECIPES as BUILDERS
    from trainer.settings import Setting, settings

    def option(setting: Setting) -> Option:
        kind = SWITCH if setting.is_switch else FILE if setting.is_path else VALUE
        return Option(setting.flags, kind, setting.choices)

    help_option = Option(("--help",), SWITCH)
    below = tuple(
        Command(f"{command}/{recipe}", (help_option, *own, *map(option, settings(build()))))
        for recipe, build in BUILDERS.items()
    )
    return Command(command, (help_option,), tuple(RECIPES), below=below)
