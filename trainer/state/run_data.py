"""Where a run's data lies now: the run, its data, or both may have been moved since."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from common.files.strict_json import read_json_file

_IDENTITIES = {"train": "data_identity", "test": "test_identity"}


class NoDataError(DataError):
    """The run had no such data, or it is not there any more."""


def run_data(run: Path, settings: Mapping[str, Any], name: str) -> tuple[Path, ...]:
    """Packed files of a run: where they lay then, or in the same place seen from the run's folder.

    Args:
        run: its folder, as it lies now.
        settings: its ``config.json``.
        name: ``train`` or ``test``.

    Raises:
        NoDataError: it had none, one is not there any more, or another file is.
        DataError: a file is damaged.
    """
    stored = stored_paths(settings, name)
    if not stored:
        raise NoDataError(f"the run had no --data.{name}")
    found = []
    for each in stored:
        path = next(filter(Path.is_file, _places(run, settings, each)), None)
        if path is None:
            raise NoDataError(f"{each} is not there any more")
        found.append(path)
    known = section(settings, "run").get(_IDENTITIES[name])
    if isinstance(known, str):
        from data_pipeline.reading.open_data import OpenData  # NumPy: not for every --help

        info = OpenData(found).info
        if info.identity != known:
            raise NoDataError(f"{info.name} is another file than the run's --data.{name} was")
    return tuple(found)


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


def stored_paths(settings: Mapping[str, Any], name: str) -> list[Path]:
    """The paths that a ``config.json`` has; runs of before there could be several have one."""
    stored = section(settings, "data").get(name)
    given = stored if isinstance(stored, list) else [stored]
    return [Path(each) for each in given if isinstance(each, str) and each]


def _places(run: Path, settings: Mapping[str, Any], stored: Path) -> list[Path]:
    out = settings.get("out")
    moved: list[Path] = []
    if isinstance(out, str) and out:
        moved.append(Path(os.path.normpath(run.absolute() / os.path.relpath(stored, out))))
    # A relative path, of older runs, is one from a folder that is not known any more: what lies
    # there as seen from here may be anything.
    return [stored, *moved] if stored.is_absolute() else [*moved, stored]


def section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a ``config.json``; an empty one where it is missing or of another kind."""
    part = settings.get(name)
    return part if isinstance(part, Mapping) else {}
