"""Writes docs/reference/: every recipe, setting and command, from the code that reads them.

Settings are those of the very parser that ``widebatch pretrain RECIPE`` has, so that a page cannot
name one that is not there; ``tests/docs/test_reference.py`` holds it.
"""

import argparse
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from launch.command_line import _parser as command_parser
from trainer.config import RunConfig
from trainer.recipes import RECIPES

_DEFAULT = re.compile(r"\s*\((?:default: (?P<default>.*)|(?P<required>required))\)$", re.DOTALL)
_FLAG = re.compile(r"(?<![\w`-])(--[a-z][\w.-]*\w)")
_WIDTH = "92"  # columns of the commands' help

_SETTINGS_HEAD = """\
# Settings

Every setting of `widebatch pretrain RECIPE`, from the program itself. `widebatch plan RECIPE` takes
them too. A recipe gives each of them a value; the command line changes it:

    --optim.base-lr 0.2        a number or a word
    --crop.scale 0.2 1.0       several values
    --no-sync-batch-norm       off; --sync-batch-norm is on

Where recipes differ, each value stands with its recipes.
"""
_RECIPES_HEAD = """\
# Recipes

A recipe is a complete run but for its data. The tables show what recipes decide differently; every
other setting has the one default that [](settings.md) names. Accuracies are published ones, top-1
by linear probe, unless it says otherwise.
"""
_COMMANDS_HEAD = """\
# Commands

What each command says of itself with `--help`. `--debug` anywhere on the line shows the traceback
of an error, `--verbose` how each kernel is computed and why.
"""


@dataclass(frozen=True)
class Setting:
    """One option of the command line, with a recipe's value."""

    flags: str
    metavar: str
    text: str
    default: str | None  # None: it has to be given

    @property
    def signature(self) -> str:
        """As it is typed."""
        return f"{self.flags} {self.metavar}".strip()


def settings_of(recipe: str) -> dict[str, list[Setting]]:
    """A recipe's settings by group: "" for those without a dot, then data, crop, ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other way to its parser
        parser = tyro.extras.get_parser(RunConfig, default=RECIPES[recipe]())
    groups: dict[str, list[Setting]] = {}
    for group in parser._action_groups:
        title = str(group.title).removesuffix("options").strip()
        found = [_setting(a) for a in group._group_actions if a.dest != "help" and a.option_strings]
        if found:
            groups[title] = found
    return groups


def _setting(action: argparse.Action) -> Setting:
    text = " ".join(str(action.help or "").split())
    match = _DEFAULT.search(text)
    return Setting(
        flags=", ".join(action.option_strings),
        metavar=str(action.metavar or "").replace("{None}|", ""),
        text=_DEFAULT.sub("", text),
        default=match["default"] if match else None,
    )


def settings_page() -> str:
    """docs/reference/settings.md."""
    lines = [_SETTINGS_HEAD]
    for title, settings in _merged_groups().items():
        lines += [f"\n## {title or 'The run'}\n"]
        for setting, defaults in settings:
            lines += [f"`{setting.signature}`", f": {_marked(setting.text)}", ""]
            lines += [f"  {_default_line(defaults)}", ""]
    return "\n".join(lines) + "\n"


_Merged = dict[str, list[tuple[Setting, dict[str, str | None]]]]


def _merged_groups() -> _Merged:
    """All recipes' settings, each with its default by recipe; objectives stay apart."""
    merged: dict[str, dict[str, tuple[Setting, dict[str, str | None]]]] = {}
    for recipe, build in RECIPES.items():
        objective = type(build().objective).__name__.removesuffix("Config")
        for title, settings in settings_of(recipe).items():
            own = title.startswith("objective")
            place = merged.setdefault(f"{title} ({objective})" if own else title, {})
            for setting in settings:
                place.setdefault(setting.flags, (setting, {}))[1][recipe] = setting.default
    # The objectives' groups side by side, where the first of them stood.
    titles = list(merged)
    order = [t for t in titles if not t.startswith("objective")]
    first = next(i for i, t in enumerate(titles) if t.startswith("objective"))
    order[first:first] = sorted(t for t in titles if t.startswith("objective"))
    return {title: list(merged[title].values()) for title in order}


def _default_line(defaults: dict[str, str | None]) -> str:
    if None in defaults.values():
        return "Must be given."
    by_value: dict[str, list[str]] = {}
    for recipe, value in defaults.items():
        by_value.setdefault(str(value).replace(recipe, "RECIPE"), []).append(recipe)
    if len(by_value) == 1:
        return f"Default: {_value(next(iter(by_value)))}"
    usual = max(by_value, key=lambda value: len(by_value[value]))
    parts = [
        f"{_value(value)} ({', '.join(names)})"
        for value, names in by_value.items()
        if value != usual
    ]
    return f"By recipe: {'; '.join(parts)}; {_value(usual)} (all others)"


def _value(text: str) -> str:
    return f"`{text}`" if text else "nothing"


def _marked(text: str) -> str:
    """Plain text as Markdown: settings as code, nothing else taken for markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part
        if part.startswith("`")
        else _FLAG.sub(r"`\1`", re.sub(r"([*_<>\[\]|])", r"\\\1", part))
        for part in parts
    )


def recipes_page() -> str:
    """docs/reference/recipes.md."""
    values = {name: _values(name) for name in RECIPES}
    varying = [
        flag
        for flag in dict.fromkeys(flag for each in values.values() for flag in each)
        if len({each.get(flag) for each in values.values()}) > 1 and flag != "--out"
    ]
    lines = [_RECIPES_HEAD]
    for name, build in RECIPES.items():
        lines += [f"\n## {name}\n", _docstring(build.__doc__ or ""), ""]
        lines += ["| setting | value |", "|---|---|"]
        lines += [
            f"| `{flag}` | `{values[name][flag]}` |" for flag in varying if flag in values[name]
        ]
    return "\n".join(lines) + "\n"


def _values(recipe: str) -> dict[str, str | None]:
    return {
        setting.flags.split(", ")[0]: setting.default
        for settings in settings_of(recipe).values()
        for setting in settings
    }


def _docstring(text: str) -> str:
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(_marked(" ".join(paragraph.split())) for paragraph in paragraphs)


def commands_page() -> str:
    """docs/reference/commands.md."""
    lines = [_COMMANDS_HEAD]
    for words in ((), *command_names()):
        lines += [f"\n## {' '.join(('widebatch', *words))}\n", "```text", help_of(words), "```"]
    return "\n".join(lines) + "\n"


def command_names() -> Iterator[tuple[str, ...]]:
    """Every command, and every method or other sub-command of one."""
    for name, parser in _subcommands(command_parser()):
        yield (name,)
        yield from ((name, below) for below, _ in _subcommands(parser))


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    found: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.items()
    return found


def help_of(words: tuple[str, ...]) -> str:
    """What ``widebatch WORDS --help`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--help"],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "COLUMNS": _WIDTH, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip("\n")


def write(folder: Path) -> None:
    """Write the pages; those that have not changed are left alone, so that builds stay quick."""
    pages = {
        "recipes.md": recipes_page(),
        "settings.md": settings_page(),
        "commands.md": commands_page(),
    }
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
