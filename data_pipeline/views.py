"""Which views a step takes of each image: groups of one size each, all cut from one decode.

Views are numbered on across groups, and a view's number decides its draws: what other groups there
are changes no byte of it.
"""

from dataclasses import dataclass

from data_pipeline.augment import ViewConfig
from data_pipeline.crops import CropConfig


@dataclass(frozen=True)
class FrameDraw:
    """Which frames of a sample's clip its views show, in the order of time: the sample is one."""

    gaps: tuple[tuple[int, int], ...]
    """Least and greatest distance between each frame and the next, in frames that move."""
    sample: int
    """Which of the frames the sample is, from 0."""
    shift: float = 0.0
    """All frames are cut alike, but for a shift of each by at most so much of the crop's side."""

    @property
    def length(self) -> int:
        """Frames of the shortest clip that has room."""
        return 1 + sum(least for least, _ in self.gaps)


@dataclass(frozen=True)
class ViewGroup:
    """Views of one size."""

    crop: CropConfig
    """Their side, and how a random one is cut."""
    looks: tuple[ViewConfig, ...]
    """How each is altered, one a view."""
    random: bool = True
    """False: every view is the largest centred square."""
    frames: FrameDraw | None = None
    """Each view shows another frame of a clip; None: all show the sample."""

    @property
    def pixels(self) -> int:
        """Of all its views of an image."""
        return len(self.looks) * self.crop.size**2


ViewPlan = tuple[ViewGroup, ...]


def decodes(plan: ViewPlan) -> int:
    """Images that are read for each place of an epoch."""
    frames = [len(group.looks) for group in plan if group.frames is not None]
    return sum(frames) + (len(frames) < len(plan))


def views_of_one_size(crop: CropConfig, count: int = 2) -> ViewPlan:
    """A plan of ``count`` random views that differ in nothing but their draws."""
    return (ViewGroup(crop, (ViewConfig(),) * count),)
