"""Two large views of an image and some small ones, all cut from one decode.

Caron et al. 2020 (SwAV, arXiv 2006.09882), section 3.2. Shapes: N images of this process, V views
of all sizes, D projection dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from common.bounds import check_bounds
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewGroup, ViewPlan
from trainer.objectives.base import ObjectiveConfig

LARGE = 2
"""Views of the large size."""


@dataclass(frozen=True, kw_only=True)
class MultiCropConfig(ObjectiveConfig):
    """Settings of the small views; the defaults are the paper's for ImageNet."""

    small_views: int = 6
    """Views of the small size, beside the two of --crop.size; 0: none."""
    small_crop: CropConfig = field(default_factory=lambda: CropConfig(size=96, scale=(0.05, 0.14)))
    """How they are cut."""
    small_blur: float | None = None
    """Probability of blur of small views; None: the first view's."""

    def __post_init__(self) -> None:
        check_bounds(self, "--objective.", small_views="[0, 1000]")
        if self.small_blur is not None:
            check_bounds(self, "--objective.", small_blur="[0, 1]")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """Two large views, and small ones that are altered as the first of them, but for blur."""
        large = ViewGroup(crop, (augment.view1, augment.view2))
        if not self.small_views:
            return (large,)
        look = augment.view1
        if self.small_blur is not None:
            look = replace(look, blur=self.small_blur)
        return large, ViewGroup(self.small_crop, (look,) * self.small_views)


def project_all(
    encoder: nn.Module,
    head: Callable[[torch.Tensor], torch.Tensor],
    views: Sequence[torch.Tensor],
) -> torch.Tensor:
    """``(N, V, D)``, the large views first: a pass for each size, one through the head for all, as
    the authors' code has it."""
    features = [encoder(views_VNCHW.flatten(0, 1)) for views_VNCHW in views]
    z_RD = head(torch.cat(features))
    return z_RD.unflatten(0, (-1, views[0].shape[1])).transpose(0, 1)
