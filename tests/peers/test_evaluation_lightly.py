"""lightly's kNN benchmark and ours give every image the same class."""

import pytest
import torch
from lightly.utils.benchmarking import knn_predict

from trainer.features.extraction import Features
from trainer.features.knn import knn_classify


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1), (200, 0.5)])
def test_weighted_neighbours_are_as_lightly_has_them(k: int, temperature: float) -> None:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 16, generator=rng)
    labels = torch.randint(7, (1500,), generator=rng)
    x = centres[labels] + 2.5 * torch.randn(1500, 16, generator=rng)
    x = torch.nn.functional.normalize(x, dim=1)
    bank, asked = x[:1200], x[1200:]
    best = knn_predict(asked, bank.T.contiguous(), labels[:1200], 7, k, temperature)
    hit = best[:, :5] == labels[1200:, None]
    ids = torch.arange(1500)
    tables = Features(bank, labels[:1200], ids[:1200]), Features(asked, labels[1200:], ids[:300])
    ours = knn_classify(*tables, k, temperature=temperature)
    assert ours.top1 == pytest.approx(hit[:, 0].double().mean().item(), abs=1e-9)
    assert 0.3 < ours.top1 < 0.95
    if k == 200:  # below, lightly fills the five best with classes that no neighbour has
        assert ours.top5 == pytest.approx(hit.any(dim=1).double().mean().item(), abs=1e-9)
