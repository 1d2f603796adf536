"""Barlow Twins against the paper's formula in float64, on one process and several."""

from typing import Any

import pytest
import torch

from tests.dist import run_ranks
from tests.trainer.plans import flow, plan, small
from trainer.objectives.barlowtwins import BarlowTwins, BarlowTwinsConfig
from trainer.objectives.base import Loss, Outputs

IMAGES, DIM, LAMBDA, SCALE = 12, 5, 0.2, 3.0


def _projections(images: int = IMAGES, dim: int = DIM) -> torch.Tensor:
    """Two views that have something in common; dimensions of other means and spreads."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((images, 1, dim), (images, 2, dim))
    )
    spread = torch.linspace(0.1, 4, dim, dtype=torch.float64)
    return (shared + own) * spread + torch.tensor([[3.0], [-8.0]], dtype=torch.float64)


def _plain(z_NVD: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, number by number."""
    one, other = (
        (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_NVD[:, 0], z_NVD[:, 1])
    )
    total = torch.zeros((), dtype=z_NVD.dtype)
    for i in range(z_NVD.shape[2]):
        for j in range(z_NVD.shape[2]):
            correlation = (one[:, i] * other[:, j]).mean()
            total = total + ((1 - correlation) ** 2 if i == j else LAMBDA * correlation**2)
    return SCALE * total


def _loss(z_NVD: torch.Tensor, **settings: Any) -> Loss:
    objective = BarlowTwins(None, None, BarlowTwinsConfig(**settings))  # type: ignore[arg-type]
    return objective.loss(Outputs({"projections": z_NVD}), 0)


def _on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    own = _projections().chunk(world_size)[rank].clone().requires_grad_()
    loss = _loss(own, redundancy_weight=LAMBDA, scale=SCALE)
    loss.value.backward()
    return {"value": loss.value.detach(), "gradient": own.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_are_those_of_the_formula_over_the_global_batch(world_size: int) -> None:
    whole = _projections().requires_grad_()
    expected = _plain(whole)
    (gradient,) = torch.autograd.grad(expected, whole)
    found = run_ranks(_on_a_rank, world_size)
    # DDP divides by W what it adds up.
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    # A few hundred additions of numbers of size 1 to 100 in float64.
    torch.testing.assert_close(rows, gradient, rtol=1e-11, atol=1e-12)
    for each in found:
        assert torch.equal(each["value"], found[0]["value"])
        torch.testing.assert_close(each["value"], expected.detach(), rtol=1e-12, atol=0)
    # The control: the mean of each half's own loss is another number.
    apart = torch.stack([_plain(half) for half in _projections().chunk(2)]).mean()
    assert (apart - expected).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero_low_precision_rows_are_standardised_as_they_are(dtype: torch.dtype) -> None:
    rows = (_projections() + 100).to(dtype)
    found = _loss(rows, redundancy_weight=LAMBDA, scale=SCALE).value
    assert found.dtype == torch.float32
    # Float32's rounding of a mean of 100 is 1e-5 of a spread of about 1, and enters squared.
    torch.testing.assert_close(found.double(), _plain(rows.double()), rtol=1e-5, atol=0)


def test_equal_views_of_uncorrelated_dimensions_cost_nothing() -> None:
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    same = signs[1:].T.double()[:, None].expand(-1, 2, -1)  # rows of a Hadamard matrix
    loss = _loss(same)
    assert loss.value == pytest.approx(0, abs=1e-9)  # 3 dimensions, each off by 1e-5, squared
    assert loss.metrics["correlation"] == pytest.approx(1, abs=2e-5)
    opposite = same * torch.tensor([[1.0], [-1.0]])
    assert _loss(opposite).value == pytest.approx(3 * 2**2, abs=1e-3)
    alike = same[:, :, :1].expand(-1, -1, 3)  # three times the same: six pairs that correlate
    assert _loss(alike).value == pytest.approx(6 * 0.0051, abs=1e-5)


def test_views_that_have_nothing_in_common_cost_one_a_dimension() -> None:
    """The loss of chance: a correlation of N images has the mean 0 and the variance 1/(N - 1)."""
    images, dim = 4096, 64
    unrelated = torch.randn(images, 2, dim, generator=torch.Generator().manual_seed(0))
    expected = dim * (1 + (1 + 0.0051 * (dim - 1)) / (images - 1))
    # Its deviation is that of the sum of 2 C_ii: 2 sqrt(D / N).
    assert _loss(unrelated).value == pytest.approx(expected, abs=4 * 2 * (dim / images) ** 0.5)


def test_a_plan_counts_the_matrix_that_processes_add_up() -> None:
    config = small(batch=1024, objective=BarlowTwinsConfig())
    cost, dim = plan(config, gpus=8), config.head.out_dim
    assert flow(cost, "correlations").nvlink_bytes == pytest.approx(2 * 4 * dim**2 * 7 / 8)
    assert not [each for each in cost.flows if each.part in ("embeddings", "log-sum-exps")]
