"""What a .beton says of itself, for tests of its content."""

from dataclasses import replace
from pathlib import Path

from data_pipeline.reading.beton import DataInfo, SampleTable
from data_pipeline.reading.open_beton import OpenBeton


def check_beton(path: Path | str, verify: bool = False, max_damaged: float = 0) -> DataInfo:
    """What a checked file holds; ``verify``: also against its checksum, which is stated then."""
    beton = OpenBeton(path, max_damaged)
    return replace(beton.info, fingerprint=beton.verify()) if verify else beton.info


def read_sample_table(path: Path | str, max_damaged: float = 0) -> SampleTable:
    """Where the samples of a checked file lie."""
    return OpenBeton(path, max_damaged).table
