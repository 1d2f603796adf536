from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from common.errors import DataError, NumericalError
from data_pipeline.augment import Augment, AugmentConfig
from tests.dist import run_ranks
from trainer.features import extraction
from trainer.features.extraction import Features, extract_features

SIDE = 4


@dataclass
class FakeBatch:
    crops_BVHWC: torch.Tensor  # noqa: N815
    ids_B: torch.Tensor  # noqa: N815
    labels_B: torch.Tensor  # noqa: N815


class FakeLoader:
    """Samples whose pixels follow from their ids; this rank's contiguous shard of them."""

    def __init__(self, num_samples: int, batch: int, rank: int = 0, world_size: int = 1) -> None:
        first = rank * num_samples // world_size
        last = (rank + 1) * num_samples // world_size
        self.local_ids = torch.arange(first, last)
        self.batch = batch

    def __iter__(self) -> Iterator[FakeBatch]:
        for ids in self.local_ids.split(self.batch):
            if len(ids):
                yield FakeBatch(crops_of(ids), ids, ids % 3)


def crops_of(ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(SIDE * SIDE * 3)
    pixels = (ids[:, None] * 31 + places * 7 + ids[:, None] * places) % 256
    return pixels.to(torch.uint8).reshape(-1, 1, SIDE, SIDE, 3)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten()
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


def extract(rank: int = 0, world_size: int = 1, num_samples: int = 23) -> Features:
    loader = FakeLoader(num_samples, 5, rank, world_size)
    return extract_features(encoder(), loader, Augment(AugmentConfig(), 0), "cpu")


def test_rows_are_the_encoders_output_in_the_order_of_the_file() -> None:
    table = extract()
    assert table.ids_N.tolist() == list(range(23))
    assert table.labels_N.tolist() == [i % 3 for i in range(23)]
    model, ids = encoder().eval(), torch.arange(23)
    expected = model(Augment(AugmentConfig(), 0).plain(crops_of(ids)))
    torch.testing.assert_close(table.features_NF, expected, atol=1e-6, rtol=1e-5)
    assert table.features_NF.dtype == torch.float32


def _in_ranks(rank: int, world_size: int) -> list[torch.Tensor]:
    extraction._GATHER_BYTES = 400  # several exchanges, the last one short
    return [x for n in (23, 2) for x in extract(rank, world_size, num_samples=n)]


def test_every_rank_gets_every_row_of_uneven_and_empty_shards() -> None:
    alone = [x for n in (23, 2) for x in extract(num_samples=n)]
    for gathered in run_ranks(_in_ranks, 3):  # 7, 8, 8 samples; then 0, 1, 1
        for ours, expected in zip(gathered, alone, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_a_module_in_training_is_left_as_it_was() -> None:
    model = encoder().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract_features(model, FakeLoader(9, 4), Augment(AugmentConfig(), 0), "cpu")
    assert model.training
    assert model[1].training
    assert not model[2].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_features_are_float32_under_autocast_and_usable_for_training() -> None:
    reduced = extract_features(
        encoder(), FakeLoader(9, 4), Augment(AugmentConfig(), 0), "cpu", torch.bfloat16
    )
    full = extract(num_samples=9)
    assert reduced.features_NF.dtype == torch.float32
    assert not torch.equal(reduced.features_NF, full.features_NF)
    torch.testing.assert_close(reduced.features_NF, full.features_NF, atol=0.1, rtol=0.05)
    classifier = nn.Linear(reduced.features_NF.shape[1], 2)
    classifier(reduced.features_NF).sum().backward()  # inference tensors would refuse


@pytest.mark.filterwarnings("error")  # torch warns of an autocast to these
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_dtypes_need_no_autocast(dtype: torch.dtype) -> None:
    augment = Augment(AugmentConfig(), 0, dtype)
    table = extract_features(encoder().to(dtype), FakeLoader(9, 4), augment, "cpu", dtype)
    torch.testing.assert_close(table.features_NF, extract(num_samples=9).features_NF)


def test_batches_in_another_order_come_back_in_the_files() -> None:
    backwards = list(FakeLoader(9, 4))[::-1]
    table = extract_features(encoder(), backwards, Augment(AugmentConfig(), 0), "cpu")
    torch.testing.assert_close(table.features_NF, extract(num_samples=9).features_NF)


def test_a_sample_that_comes_twice_is_a_defect() -> None:
    overlapping = [*FakeLoader(9, 4), *FakeLoader(3, 4)]
    with pytest.raises(ValueError, match="sample 0 twice"):
        extract_features(encoder(), overlapping, Augment(AugmentConfig(), 0), "cpu")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        extract_features(encoder(), [], Augment(AugmentConfig(), 0), "cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
def test_features_that_are_not_finite_name_the_first_sample(value: float) -> None:
    """1e20 is, but its square is not: normalised, the row would be zeros."""

    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.flatten(1).clone()
            y[-1, 0] = value
            return y

    with pytest.raises(NumericalError, match="2 of 8 samples, the first being sample 3"):
        extract_features(Breaks(), FakeLoader(8, 4), Augment(AugmentConfig(), 0), "cpu")
