"""Crop boxes are torchvision's, drawn from coordinates; resampling is its too, in integers."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from data_pipeline.crops import CropConfig, centre_crop_boxes, random_resized_crop_boxes
from data_pipeline.reading import resample
from tests.data_pipeline.images import picture

HEIGHTS = np.array([375, 500, 32, 1, 1, 7, 2000, 100, 1000, 64])
WIDTHS = np.array([500, 375, 32, 1, 9, 1, 3, 101, 10, 64])
IDS = np.arange(10) * 17
DEFAULT = CropConfig()


def boxes(
    ids: npt.NDArray[np.int64] = IDS,
    seed: int = 1,
    epoch: int = 2,
    views: int = 3,
    crop: CropConfig = DEFAULT,
) -> npt.NDArray[np.int64]:
    chosen = np.searchsorted(IDS, ids)
    return random_resized_crop_boxes(seed, epoch, ids, views, HEIGHTS[chosen], WIDTHS[chosen], crop)


def one_box(
    seed: int, epoch: int, sample: int, view: int, height: int, width: int, crop: CropConfig
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, line by line, on the counter generator."""
    key = sample_keys(seed, epoch, sample, view, Stream.CROP)
    draws = iter(float(uniforms(key, k)) for k in range(40))
    low, high = (math.log(r) for r in crop.ratio)
    for _ in range(10):
        area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * next(draws))
        ratio = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = next(draws), next(draws)
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("crop", [CropConfig(), CropConfig(scale=(0.2, 1.0), ratio=(0.5, 0.6))])
def test_boxes_follow_torchvisions_algorithm(crop: CropConfig) -> None:
    for epoch in range(20):
        found = boxes(epoch=epoch, crop=crop)
        for n, (sample, height, width) in enumerate(zip(IDS, HEIGHTS, WIDTHS)):
            for view in range(3):
                expected = one_box(1, epoch, int(sample), view, int(height), int(width), crop)
                assert tuple(found[n, view]) == expected


def test_boxes_are_distributed_as_torchvisions() -> None:
    n, height, width = 20_000, 375, 500
    ours = random_resized_crop_boxes(
        0, 0, np.arange(n), 1, np.full(n, height), np.full(n, width), CropConfig()
    )[:, 0]
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(224), torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(5000)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 5 * error
        assert abs(np.quantile(a, 0.9) - np.quantile(b, 0.9)) < 0.05 * b.max()


def test_boxes_lie_inside_their_images() -> None:
    found = np.concatenate(
        [boxes(epoch=epoch, crop=CropConfig(ratio=(0.1, 10.0))) for epoch in range(50)]
    )
    top, left, height, width = np.moveaxis(found.reshape(50, 10, 3, 4), -1, 0)
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= HEIGHTS[:, None]).all() and (left + width <= WIDTHS[:, None]).all()


def test_a_box_depends_on_nothing_but_its_coordinates() -> None:
    whole = boxes()
    assert np.array_equal(boxes(IDS[::3]), whole[::3])  # not on the batch
    assert np.array_equal(boxes(views=1), whole[:, :1])  # not on the number of views
    assert (boxes(seed=2) != whole).any() and (boxes(epoch=3) != whole).any()
    assert (whole[:2, 0] != whole[:2, 1]).any(-1).all()  # views differ


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size 0: must be a number from 2"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
    ],
)
def test_impossible_crops_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CropConfig(**settings)  # type: ignore[arg-type]


def test_centre_crops_show_what_resize_and_crop_show() -> None:
    for height, width in ((375, 500), (500, 375), (224, 224), (31, 1000)):
        image = tv.to_image(picture(height, width))
        top, left, h, w = centre_crop_boxes([height], [width], 224, 256)[0, 0]
        ours = tv.resized_crop(image, int(top), int(left), int(h), int(w), [224, 224])
        theirs = tv.center_crop(tv.resize(image, [256]), [224])
        difference = (ours.int() - theirs.int()).abs().float()
        assert difference.mean() < 1.5, (height, width)


def test_an_image_of_the_crops_size_is_shown_whole() -> None:
    assert centre_crop_boxes([64], [64], 64, 64).tolist() == [[[0, 0, 64, 64]]]


def cut(image: npt.NDArray[np.uint8], box: tuple[int, ...], size: int) -> npt.NDArray[np.uint8]:
    height, width = image.shape[:2]
    planes = np.empty((3, height, width), np.uint8)
    resample.split_channels(image, planes)
    out = np.zeros((size, size, 3), np.uint8)
    scratch = resample.make_scratch(size, height, width)
    resample.crop(tuple(planes), np.ones(4), True, np.array(box), scratch, out)
    return out


@pytest.mark.parametrize("size", [224, 97, 32, 8, 3])
@pytest.mark.parametrize(
    "box",
    [(10, 20, 300, 333), (5, 7, 150, 140), (0, 0, 375, 500), (374, 499, 1, 1), (3, 0, 2, 500)],
)
def test_resampling_is_within_one_level_of_torchvisions(box: tuple[int, ...], size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    theirs = tv.resized_crop(tv.to_image(noise).contiguous(), *box, [size, size], antialias=True)
    difference = cut(noise, box, size).astype(int) - theirs.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1
    assert size < 32 or abs(difference.mean()) < 0.1


def test_a_crop_of_the_views_size_is_not_resampled() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for size in (32, 33):
        assert np.array_equal(
            cut(noise, (5, 6, size, size), size), noise[5 : 5 + size, 6 : 6 + size]
        )


def test_the_boxes_of_old_runs_stay_what_they_were() -> None:
    """The second image is so wide that most attempts at a box fail."""
    found = random_resized_crop_boxes(42, 3, [7, 54422], 2, [375, 40], [500, 300], DEFAULT)
    assert found.tolist() == [
        [[17, 155, 310, 250], [62, 4, 157, 209]],
        [[0, 22, 40, 47], [0, 123, 40, 53]],
    ]


def test_flat_areas_keep_their_value() -> None:
    for value in (0, 1, 127, 254, 255):
        flat = np.full((301, 211, 3), value, np.uint8)
        for size in (224, 30):
            assert (cut(flat, (0, 0, 301, 211), size) == value).all()
