"""Images of a data set as a report shows them: whole, and as the views that training saw.

Shape suffixes: M samples of a file, N images, R rows of a grid, V views, S side in pixels.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.beton import check_beton, read_sample_table
from data_pipeline.reading.loader import Batch, LoaderConfig, train_loader
from data_pipeline.reading.order import Position
from trainer.config import from_json
from trainer.evaluation.load_encoder import Preprocessing
from trainer.evaluation.pictures import CropReader

Images = npt.NDArray[np.uint8]
# FFCV would compile for seconds to read a few images.
_LOADER = LoaderConfig(backend="torchvision", workers=1)


class Samples(NamedTuple):
    """Centre crops of some samples of a file."""

    images_NSS3: Images  # noqa: N815
    ids_N: npt.NDArray[np.int64]  # noqa: N815
    labels_N: npt.NDArray[np.int64]  # noqa: N815
    """-1 where the file has no labels."""
    class_names: tuple[str, ...]


def read_spread(path: Path, limit: int, how: Preprocessing) -> Samples:
    """At most ``limit`` images, evenly spread over a file, as the encoder is to see them.

    Raises:
        DataError: the file or a sample cannot be read.
    """
    class_names = check_beton(path).class_names
    labels_M = read_sample_table(path).labels
    ids_N = evenly(len(labels_M), limit)
    images = CropReader(path, how).read(ids_N.tolist())
    return Samples(images, ids_N, np.asarray(labels_M[ids_N], np.int64), class_names)


def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of the numbers below ``count``: the first, the last, and some between."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def first_views(
    train: Path, settings: dict[str, Any], rows: int
) -> tuple[npt.NDArray[np.int64], Images, Images]:
    """The first samples of a run and the very views of them that its first epoch saw.

    Returns:
        Ids (R,), images (R, S, S, 3), cut to their middle square, and views (R, V, S, S, 3).
    """
    crop, augment, seed = _how(settings)
    batch = _first_batch(train, crop, seed, rows)
    # Without normalisation, views are colours.
    view = Augment(dataclasses.replace(augment, normalize=False), seed)
    views_VN3SS = _augmented(view, batch).clamp(0, 1)
    views_RVSS3 = (views_VN3SS.permute(1, 0, 3, 4, 2) * 255).round().to(torch.uint8)
    ids_R = batch.ids_B.numpy()
    whole = Preprocessing(size=crop.size, resize=crop.size)
    originals_RSS3 = CropReader(train, whole).read(ids_R.tolist())
    return ids_R, originals_RSS3, views_RVSS3.contiguous().numpy()


def view_batch(train: Path, settings: dict[str, Any], count: int) -> torch.Tensor:
    """Views (V, N, 3, S, S) of the first ``count`` samples of a run, normalised for its encoder."""
    crop, augment, seed = _how(settings)
    return _augmented(Augment(augment, seed), _first_batch(train, crop, seed, count))


def _how(settings: dict[str, Any]) -> tuple[CropConfig, AugmentConfig, int]:
    crop = from_json(CropConfig, settings.get("crop"), "config.json: crop")
    augment = from_json(AugmentConfig, settings.get("augment"), "config.json: augment")
    seed = settings.get("seed")
    return crop, augment, seed if isinstance(seed, int) else 0


def _first_batch(train: Path, crop: CropConfig, seed: int, count: int) -> Batch:
    count = min(count, len(read_sample_table(train).labels))
    loader = train_loader(train, crop, _LOADER, seed=seed, batch_size=count)
    with contextlib.closing(loader):
        return next(loader.starting_at(Position(0, 0)))


def _augmented(augment: Augment, batch: Batch) -> torch.Tensor:
    views = augment(batch.crops_BVHWC, batch.ids_B, batch.position.epoch)
    return views.unflatten(0, (-1, len(batch.ids_B)))
