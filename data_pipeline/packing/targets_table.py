"""What a table says of images beside their class: several labels, or numbers to predict.

Shapes: N images of a source, T targets.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.reading.beton import MAX_TARGETS

if TYPE_CHECKING:
    from data_pipeline.packing.sources import Source


@dataclass(frozen=True)
class Targets:
    """Of all images of a source."""

    names: tuple[str, ...]
    values_NT: npt.NDArray[np.float64]  # noqa: N815
    """NaN where nobody knows."""


def no_targets(count: int) -> Targets:
    """Of a source without a table."""
    return Targets((), np.empty((count, 0)))


def read_targets(path: Path, images: "Source") -> Targets:
    """Read a CSV file: a head with the targets' names behind the first column's, and a row for each
    image, with its path below the packed folder and a number for each target; empty: unknown.

    Raises:
        DataError: it cannot be read, or lacks an image; names the line.
    """
    try:
        # Names of files may be of any bytes.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            names = _names(path, next(rows, []))
            found: dict[str, list[float]] = {}
            for row in filter(None, rows):
                place, name = f"{path}: line {rows.line_num}", row[0].strip().removeprefix("./")
                if len(row) != len(names) + 1:
                    raise DataError(f"{place}: {len(row)} columns, the head has {len(names) + 1}")
                if name in found:
                    raise DataError(f"{place}: {name} is there twice")
                found[name] = [_number(place, each) for each in row[1:]]
    except (OSError, csv.Error) as error:
        raise DataError(f"--targets {path}: cannot be read: {error}") from error
    ordered = [images.name(index) for index in range(len(images))]
    missing = [name for name in ordered if name not in found]
    if missing:
        its_own = f", and the table {next(iter(found))}" if found else ""
        raise DataError(
            f"{path}: no row for {len(missing)} of {len(ordered)} images: the data has {missing[0]}"
            f"{its_own}; line 1 is the head, the first column has paths below the packed folder"
            " (#0, #1, ... of embedded and torchvision's sets)"
        )
    return Targets(names, np.array([found[name] for name in ordered], np.float64))


def _names(path: Path, head: list[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in head[1:])
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: line 1 must name the file's column and different targets, with commas between"
        )
    if len(names) > MAX_TARGETS:
        raise DataError(f"{path}: {len(names)} targets; a .beton has room for {MAX_TARGETS}")
    return names


def _number(place: str, text: str) -> float:
    try:
        number = float(text) if text.strip() else math.nan
    except ValueError:
        number = math.inf
    if math.isinf(number):
        raise DataError(f"{place}: {text!r} is no number; leave it empty where it is unknown")
    return number
