"""Images of a data set as a report shows them: whole, and as the views that training saw.

Shape suffixes: M samples of a set, N images, R rows of a grid, V views, S side in pixels.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import ViewGroup, ViewPlan
from trainer.config import RunConfig, from_json
from trainer.evaluation.load_encoder import Preprocessing
from trainer.evaluation.pictures import Album

Images = npt.NDArray[np.uint8]
# FFCV would compile for seconds to read a few images.
_LOADER = LoaderConfig(backend="torchvision", workers=1)


class Samples(NamedTuple):
    """Centre crops of some samples of a set."""

    images_NSS3: Images  # noqa: N815
    ids_N: npt.NDArray[np.int64]  # noqa: N815
    labels_N: npt.NDArray[np.int64]  # noqa: N815
    """-1 where the set has no labels."""
    class_names: tuple[str, ...]

    def take(self, which: npt.NDArray[np.int64]) -> "Samples":
        """Some of them."""
        return Samples(
            self.images_NSS3[which], self.ids_N[which], self.labels_N[which], self.class_names
        )

    def class_name(self, label: int) -> str:
        """A label in words."""
        if label < 0:
            return "no label"
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"


@dataclass(frozen=True)
class Views:
    """Images and what augmentation made of them."""

    ids_R: npt.NDArray[np.int64]  # noqa: N815
    originals_RSS3: Images  # noqa: N815
    views_RVSS3: Images  # noqa: N815

    def rows(self) -> Iterator[tuple[int, Images, Images]]:
        """Id, image (S, S, 3) and views (V, S, S, 3) of each."""
        return zip(self.ids_R.tolist(), self.originals_RSS3, self.views_RVSS3)


def read_spread(data: OpenData, limit: int, how: Preprocessing) -> Samples:
    """At most ``limit`` images, evenly spread over a set, as the encoder is to see them.

    Raises:
        DataError: a sample cannot be read.
    """
    labels_M = data.table.labels
    ids_N = evenly(len(labels_M), limit)
    images = Album(data, how).read(ids_N.tolist())
    return Samples(images, ids_N, np.asarray(labels_M[ids_N], np.int64), data.info.class_names)


def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of the numbers below ``count``: the first, the last, and some between."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def first_views(train: OpenData, settings: dict[str, Any], rows: int) -> Views:
    """The first samples of a run, cut to their middle, and what its first epoch saw of them."""
    saved = {name: value for name, value in settings.items() if name != "run"}
    plan = from_json(RunConfig, saved, "config.json").view_plan()
    # Without normalisation, views are colours.
    ids_R, groups = drawn_views(train, settings, plan, rows, normalized=False)
    side = plan[0].crop.size
    # Smaller ones are enlarged, each pixel to a square.
    views_VR3SS = torch.cat(
        [resize(views_VR3SS, [side, side], InterpolationMode.NEAREST) for views_VR3SS in groups]
    )
    views_RVSS3 = (views_VR3SS.permute(1, 0, 3, 4, 2).clamp(0, 1) * 255).round().to(torch.uint8)
    originals_RSS3 = Album(train, Preprocessing(size=side, resize=side)).read(ids_R.tolist())
    return Views(ids_R.numpy(), originals_RSS3, views_RVSS3.contiguous().numpy())


def view_pairs(train: OpenData, settings: dict[str, Any], count: int) -> torch.Tensor:
    """Two views (2, N, 3, S, S) of each of a run's first ``count`` samples, as its encoder sees
    them; also of a run that takes one view of an image, or more."""
    crop = from_json(CropConfig, settings.get("crop"), "config.json: crop")
    augment = from_json(AugmentConfig, settings.get("augment"), "config.json: augment")
    plan = (ViewGroup(crop, (augment.view1, augment.view2)),)
    return drawn_views(train, settings, plan, count, normalized=True)[1][0]


def drawn_views(
    train: OpenData, settings: dict[str, Any], plan: ViewPlan, count: int, *, normalized: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Ids (N,) of the first ``count`` samples of a run, and their views in the first epoch.

    Of each group (V, N, 3, S, S), normalised as for the run's encoder, or not at all.
    """
    augment = from_json(AugmentConfig, settings.get("augment"), "config.json: augment")
    augment = dataclasses.replace(augment, normalize=normalized and augment.normalize)
    seed = settings.get("seed")
    seed = seed if isinstance(seed, int) else 0
    count = min(count, train.info.num_samples)
    with contextlib.closing(
        TrainLoader(train, plan, _LOADER, seed=seed, batch_size=count)
    ) as loader:
        batch = next(loader.starting_at(Position(0, 0)))
    views = Augment(augment, seed, looks=[group.looks for group in plan])
    return batch.ids_B, views.groups(batch.crops, batch.drawn_by_B, batch.position.epoch)
