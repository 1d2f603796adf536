"""Where a run's data lies now: the run, its data, or both may have been moved since."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError

_IDENTITIES = {"train": "data_identity", "test": "test_identity"}


class NoDataError(DataError):
    """The run had no such data, or it is not there any more."""


def run_data(run: Path, settings: Mapping[str, Any], name: str) -> Path:
    """A packed file of a run: where it lay then, or in the same place seen from the run's folder.

    Args:
        run: its folder, as it lies now.
        settings: its ``config.json``.
        name: ``train`` or ``test``.

    Raises:
        NoDataError: it had none, it is not there any more, or another file is.
        DataError: the file is damaged.
    """
    from data_pipeline.reading.beton import check_beton  # NumPy: not for every command's --help

    stored = section(settings, "data").get(name)
    if not isinstance(stored, str) or not stored:
        raise NoDataError(f"the run had no --data.{name}")
    for path in _places(run, settings, Path(stored)):
        if path.is_file():
            break
    else:
        raise NoDataError(f"{stored} is not there any more")
    known = section(settings, "run").get(_IDENTITIES[name])
    if isinstance(known, str) and check_beton(path).identity != known:
        raise NoDataError(f"{path} is another file than the run's --data.{name} was")
    return path


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
