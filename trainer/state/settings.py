"""The settings of a run: as the command line names them, and beside its recipe's.

tyro makes the command line from the same dataclasses; a test holds the two to each other. The walk
is for what tyro does not say: which flags there are, and which words give a configuration.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trainer.config import to_json
from trainer.recipes import RECIPES

_OF_THE_USER = ("data", "out", "run", "recipe", "resume")  # a recipe leaves these to them


@dataclass(frozen=True)
class Setting:
    """One field of a configuration, or of a part of it."""

    key: str
    """Its name in config.json, with dots: ``optim.base_lr``."""
    flag: str
    """Its name on the command line: ``--optim.base-lr``."""
    value: Any
    choices: tuple[str, ...] = ()
    is_path: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether the flag itself is the value: ``--compile``, ``--no-compile``."""
        return isinstance(self.value, bool)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flag; of a switch also the one that turns it off."""
        if not self.is_switch:
            return (self.flag,)
        group, dot, name = self.flag.removeprefix("--").rpartition(".")
        return (self.flag, f"--{group}{dot}no-{name}")

    def words(self) -> list[str]:
        """What to write on a command line for this value."""
        if self.is_switch:
            return [self.flags[0 if self.value else 1]]
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return [self.flag, *map(str, values)]


def settings(config: Any) -> list[Setting]:
    """All settings of ``config`` that the command line has, in its order.

    Those of the objective are the ones of this configuration's objective.
    """
    return list(_walk(config, "", ""))


def changed_from(base: Any, config: Any) -> list[Setting]:
    """Settings of ``config`` that ``base`` does not have, or has with another value."""
    values = {setting.key: setting.value for setting in settings(base)}
    missing = object()
    return [s for s in settings(config) if values.get(s.key, missing) != s.value]


def flat(saved: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings of a ``config.json`` by dotted name, as text; not what the run noted as ``run``."""
    found: dict[str, str] = {}
    for key, value in saved.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            if prefix or key != "run":
                found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _text(value)
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def changed(saved: Mapping[str, Any]) -> dict[str, tuple[str, str]] | None:
    """Settings of a ``config.json`` that are not its recipe's of today: (recipe's, run's) by name.

    Returns:
        ``None`` where the run names no recipe that is there.
    """
    name = saved.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        return None
    values = {key: value for key, value in vars(RECIPES[name]()).items() if key not in _OF_THE_USER}
    recipe = flat(to_json(values))
    mine = {k: v for k, v in flat(saved).items() if k.split(".")[0] not in _OF_THE_USER}
    # A run may be older than a setting of today's recipe: that is no difference.
    pairs = {name: (recipe.get(name, "-"), value) for name, value in sorted(mine.items())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _walk(part: Any, keys: str, flags: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(type(part), include_extras=True)
    for field in dataclasses.fields(part):
        hint, flag, shown = _named(hints[field.name], field.name.replace("_", "-"))
        if not shown:
            continue
        key, value = keys + field.name, getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{key}.", f"{flags}{flag}." if flag else flags)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, each in enumerate(value):
                yield from _walk(each, f"{key}.{number}.", f"{flags}{flag}.{number}.")
        else:
            kinds = (hint, *typing.get_args(hint))  # of a union or a tuple
            choices = [c for kind in kinds for c in _choices(kind)]
            yield Setting(key, f"--{flags}{flag}", value, tuple(choices), Path in kinds)


def _named(hint: Any, name: str) -> tuple[Any, str, bool]:
    """The type below tyro's annotations, the name that they give, and whether it is shown."""
    if typing.get_origin(hint) is not Annotated:
        return hint, name, True
    inner, *notes = typing.get_args(hint)
    given = [note.name for note in notes if getattr(note, "name", None) is not None]
    shown = tyro.conf.Suppress not in notes and tyro.conf.Positional not in notes
    return inner, given[0] if given else name, shown


def _choices(hint: Any) -> tuple[str, ...]:
    is_literal = typing.get_origin(hint) is Literal
    return tuple(map(str, typing.get_args(hint))) if is_literal else ()
