"""Files with damaged samples, as failing disks and hostile hands make them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.packing import beton_writer
from data_pipeline.reading import beton
from tests.data_pipeline.betons import read_sample_table

TABLES = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize  # bytes before the samples' metadata

Change = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy with its header, metadata and allocation table changed, without a manifest."""
    data = bytearray(source.read_bytes())
    header = np.frombuffer(data, beton.HEADER, 1)
    count, tail = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    metadata = np.frombuffer(data, beton_writer.METADATA, count, TABLES)
    allocations = np.frombuffer(data, beton.ALLOCATION, count, tail)
    change(header, metadata, allocations)
    target.write_bytes(data)
    return target


def overwritten(source: Path, target: Path, patches: dict[int, tuple[bytes, int]]) -> Path:
    """A copy without a manifest; ``patches``: sample -> bytes, and where in its data they go."""
    data, table = bytearray(source.read_bytes()), read_sample_table(source)
    for sample, (patch, at) in patches.items():
        start = int(table.offsets[sample]) + (at if at >= 0 else int(table.sizes[sample]) + at)
        data[start : start + len(patch)] = patch
    target.write_bytes(data)
    return target


NOISE = (bytes(range(1, 120)), -250)
"""Coefficients overwritten: libjpeg warns and shows garbage."""
ZEROS = (bytes(300), 0)
"""No JPEG at all."""


def far_away(sample: int) -> Change:
    """Both tables agree that a sample lies a terabyte past the file's end."""

    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        row = int(np.flatnonzero(allocations["sample_id"] == sample)[0])
        allocations["ptr"][row] = metadata["f0"]["data_ptr"][sample] = 1 << 40

    return change


def empty(sample: int) -> Change:
    """A sample of no bytes."""

    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        allocations["size"][allocations["sample_id"] == sample] = 0

    return change


def together(*changes: Change) -> Change:
    """Several changes to one file."""

    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        for each in changes:
            each(header, metadata, allocations)

    return change
