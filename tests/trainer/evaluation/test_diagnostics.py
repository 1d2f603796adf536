import pytest
import torch

from trainer.evaluation import diagnose as module
from trainer.evaluation.diagnose import spectrum, uniformity
from trainer.health.collapse import figures, moments


def features(count: int = 300, width: int = 16) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=rng) * torch.linspace(0.1, 2, width)


@pytest.mark.parametrize("rows", [1024, 7])
def test_uniformity_is_the_papers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    x = torch.nn.functional.normalize(features().double(), dim=1)
    theirs = torch.pdist(x).pow(2).mul(-2).exp().mean().log()  # their appendix A, t = 2
    assert uniformity(features(), "cpu") == pytest.approx(float(theirs), abs=1e-6)


def test_effective_rank_is_rankmes() -> None:
    x = torch.nn.functional.normalize(features().double(), dim=1)
    singular = torch.linalg.svdvals(x)
    share = singular / singular.sum() + 1e-7
    assert spectrum(features(), "cpu")[1] == pytest.approx(
        float((-(share * share.log()).sum()).exp()), rel=1e-6
    )


def test_offline_figures_are_those_of_training() -> None:
    assert spectrum(features(), "cpu") == pytest.approx(figures(moments(features()), 16))


def test_wide_features_have_an_effective_rank_too() -> None:
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(0))
    assert 45 < spectrum(x, "cpu")[1] < 51


def test_a_collapsed_encoder_is_seen() -> None:
    collapsed = torch.ones(100, 8) + 1e-4 * features(100, 8)
    std, rank = spectrum(collapsed, "cpu")
    assert std < 1e-3
    assert rank < 1.01
    assert uniformity(collapsed, "cpu") == pytest.approx(0.0, abs=1e-3)
    assert spectrum(torch.ones(5, 1), "cpu")[1] == 1.0


def test_evenly_spread_features_reach_the_bounds() -> None:
    std, rank = spectrum(torch.cat([torch.eye(8), -torch.eye(8)]), "cpu")
    assert (std, rank) == pytest.approx((1.0, 8.0), rel=1e-5)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "cpu") == pytest.approx(-8.0)
