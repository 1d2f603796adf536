"""Groups of views: one decode, numbers that run on, and no group that another one changes."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.augment import Augment, AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.loader import EvalLoader, TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import ViewGroup, ViewPlan, views_of_one_size
from tests.data_pipeline.batches import BATCH

LARGE = CropConfig(size=24, scale=(0.2, 1.0))
SMALL = CropConfig(size=12, scale=(0.05, 0.2))
PLAIN = ViewConfig()
BOTH = (ViewGroup(LARGE, (PLAIN,) * 2), ViewGroup(SMALL, (PLAIN,) * 3))


@pytest.fixture(params=["ffcv", "torchvision"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def first_batch(path: Path, views: ViewPlan, backend: str, max_substitutes: float = 0) -> Batch:
    config = LoaderConfig(backend=backend, workers=2)  # type: ignore[arg-type]
    data = OpenData(path, max_substitutes)
    loader = TrainLoader(data, views, config, seed=3, batch_size=BATCH)
    with closing(loader):
        return next(loader.starting_at(Position(1, 0)))


def test_a_group_has_the_bytes_that_it_has_alone(jpegs: Path, backend: str) -> None:
    both, alone = (first_batch(jpegs, plan, backend) for plan in (BOTH, BOTH[:1]))
    assert [crops.shape for crops in both.crops] == [(BATCH, 2, 24, 24, 3), (BATCH, 3, 12, 12, 3)]
    assert torch.equal(both.crops[0], alone.crops[0])


def test_a_views_crop_is_that_of_its_number_whatever_stands_before(
    jpegs: Path, backend: str
) -> None:
    both = first_batch(jpegs, BOTH, backend)
    every = first_batch(jpegs, views_of_one_size(SMALL, 5), backend)
    assert torch.equal(both.crops[1], every.crops[0][:, 2:])
    assert not torch.equal(both.crops[1], every.crops[0][:, :3])


def test_a_fixed_view_is_the_centred_square(jpegs: Path, backend: str) -> None:
    plan = (BOTH[0], replace(BOTH[1], random=False))
    batch = first_batch(jpegs, plan, backend)
    config = LoaderConfig(backend=backend, workers=1)  # type: ignore[arg-type]
    loader = EvalLoader(OpenData(jpegs), SMALL.size, SMALL.size, config, batch_size=1000)
    with closing(loader):
        centred = next(iter(loader)).crops_BVHWC[batch.ids_B]
    assert torch.equal(batch.crops[1], centred.expand(-1, 3, -1, -1, -1))


def test_augmentation_of_a_view_is_that_of_its_number() -> None:
    looks = ((PLAIN, replace(PLAIN, solarize=0.5)), (replace(PLAIN, blur=1.0), PLAIN, PLAIN))
    crops = [
        torch.randint(0, 256, (6, 2, 24, 24, 3), dtype=torch.uint8),
        torch.randint(0, 256, (6, 3, 12, 12, 3), dtype=torch.uint8),
    ]
    ids = torch.tensor([5, 0, 17, 2, 40, 9])
    large, small = Augment(AugmentConfig(), 7, looks=looks).groups(crops, ids, 3)
    assert large.shape == (2, 6, 3, 24, 24) and small.shape == (3, 6, 3, 12, 12)
    assert all(view[0].is_contiguous(memory_format=torch.channels_last) for view in (large, small))
    two = AugmentConfig(view1=looks[0][0], view2=looks[0][1])
    assert torch.equal(large, Augment(two, 7)(crops[0], ids, 3).unflatten(0, (2, 6)))
    # The same look under another number draws other numbers.
    padded = torch.cat([crops[1][:, :2], crops[1]], 1)
    (every,) = Augment(AugmentConfig(), 7, looks=[(*looks[0], *looks[1])]).groups([padded], ids, 3)
    assert torch.equal(small, every[2:])


def test_crops_that_the_looks_do_not_describe_are_refused() -> None:
    augment = Augment(AugmentConfig(), 0, looks=[(PLAIN,)])
    with pytest.raises(ValueError, match="3 ids and 1 looks for crops of shape"):
        augment.groups([torch.zeros(3, 2, 8, 8, 3, dtype=torch.uint8)], torch.arange(3), 0)
