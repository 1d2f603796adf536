"""A run's settings: as it saved them, beside its recipe's, beside other runs'."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from common.files.strict_json import read_json_file
from trainer.config import to_json
from trainer.recipes import RECIPES
from trainer.state.run_data import section

Flat = dict[str, str]
"""Settings by dotted name, values as text."""

# A recipe leaves these to the user.
_OF_THE_USER = ("data", "out", "run", "recipe", "resume")


def read_settings(run: Path) -> dict[str, Any]:
    """``config.json`` of a run.

    Raises:
        ConfigError: it is not there or unreadable.
    """
    path = run / "config.json"
    try:
        return read_json_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{run}: holds no config.json; name the folder of a run") from None
    except DataError as error:
        raise ConfigError(str(error)) from None


def flat(settings: Mapping[str, Any], prefix: str = "") -> Flat:
    """Settings by dotted name, without the facts that the run noted under ``run``."""
    found: Flat = {}
    for key, value in settings.items():
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


def changed(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]] | None:
    """Settings that differ from what the run's recipe says today: name to (recipe's, run's).

    Returns:
        ``None`` where the run names no recipe that is there.
    """
    name = settings.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        return None
    values = {key: value for key, value in vars(RECIPES[name]()).items() if key not in _OF_THE_USER}
    recipe = flat(to_json(values))
    mine = {k: v for k, v in flat(settings).items() if k.split(".")[0] not in _OF_THE_USER}
    # A run may be older than a setting of today's recipe: that is no difference.
    pairs = {name: (recipe.get(name, "-"), value) for name, value in sorted(mine.items())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings in which runs differ: name to each run's value, ``-`` where it has none."""
    each = [flat(settings) for settings in runs]
    names = sorted({name for values in each for name in values})
    rows = {name: [values.get(name, "-") for values in each] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def title(settings: Mapping[str, Any]) -> str:
    """Recipe, encoder and length of a run, in one line."""
    steps, batch = section(settings, "run").get("total_steps"), settings.get("batch")
    encoder = section(settings, "encoder").get("name", "encoder")
    known = type(steps) is int and type(batch) is int
    length = f", {steps:,} steps of {batch:,} images" if known else ""
    return f"{settings.get('recipe') or 'run'}: {encoder}{length}"
