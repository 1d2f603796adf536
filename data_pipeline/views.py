"""Which views a step takes of each image: groups of one size each, all cut from one decode.

Views are numbered on across groups, and a view's number decides its draws: what other groups there
are changes no byte of it.
"""

from dataclasses import dataclass

from data_pipeline.augment import ViewConfig
from data_pipeline.crops import CropConfig


@dataclass(frozen=True)
class ViewGroup:
    """Views of one size."""

    crop: CropConfig
    """Their side, and how a random one is cut."""
    looks: tuple[ViewConfig, ...]
    """How each is altered, one a view."""
    random: bool = True
    """False: every view is the largest centred square."""

    @property
    def pixels(self) -> int:
        """Of all its views of an image."""
        return len(self.looks) * self.crop.size**2


ViewPlan = tuple[ViewGroup, ...]


def views_of_one_size(crop: CropConfig, count: int = 2) -> ViewPlan:
    """A plan of ``count`` random views that differ in nothing but their draws."""
    return (ViewGroup(crop, (ViewConfig(),) * count),)
