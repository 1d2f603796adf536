"""How much a report looks at, and the error that says what a part of it lacks."""

import dataclasses
from dataclasses import dataclass

from common.errors import ConfigError


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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"report.{field.name} must be 1 or more, got {value}")


class MissingError(Exception):
    """What a part of the report is made of is not there; the message says what."""
