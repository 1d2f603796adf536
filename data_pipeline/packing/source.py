"""What a source of images is to packing: a numbered set of images with labels."""

from dataclasses import dataclass
from typing import Protocol

from data_pipeline.packing.image_codec import ImageData, LeftOut

NO_LABEL = -1


@dataclass(frozen=True)
class Sample:
    """One image, or why it cannot be had, and its label (:data:`NO_LABEL` where there is none)."""

    image: ImageData | LeftOut
    label: int


class Source(Protocol):
    """A numbered set of images, which names them for reports and hands out each with its label."""

    description: dict[str, str]
    class_names: tuple[str, ...]
    passed_over: dict[str, list[str]]  # why -> names

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a report."""
        ...

    def sample(self, index: int) -> Sample:
        """An image and its label."""
        ...
