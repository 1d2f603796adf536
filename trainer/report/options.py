"""How much a report looks at, and the error that says what a part of it lacks."""

import dataclasses
from dataclasses import dataclass

from common.bounds import check_bounds


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much a report looks at."""

    max_images: int = 1000
    """Images of each data set that go through the encoder, evenly spread over the file."""
    view_rows: int = 8
    """Samples whose views are shown."""
    queries: int = 8
    """Images whose nearest neighbours are shown."""
    neighbours: int = 6
    """Neighbours of each."""
    map_images: int = 400
    """Images on the map."""
    pairs: int = 256
    """Images whose views' similarities are compared."""
    device: str = "auto"
    """Of the encoder: auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        counts = [f.name for f in dataclasses.fields(self) if f.name != "device"]
        check_bounds(self, "--", **dict.fromkeys(counts, "[1, 1e9]"))


class MissingError(Exception):
    """What a part of the report is made of is not there; the message says what."""
