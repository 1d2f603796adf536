"""VICReg against the paper's formula in float64, on one process and several."""

from typing import Any

import pytest
import torch

from tests.dist import run_ranks
from tests.trainer.plans import flow, plan, small
from trainer.objectives.base import Loss, Outputs
from trainer.objectives.vicreg import VICReg, VICRegConfig

IMAGES, DIM = 12, 5
WEIGHTS = {"invariance": 3.0, "variance": 7.0, "covariance": 2.0}


def _projections(images: int = IMAGES, dim: int = DIM) -> torch.Tensor:
    """Two views that have something in common; some dimensions spread more than 1, some less."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((images, 1, dim), (images, 2, dim))
    )
    spread = torch.linspace(0.1, 2, dim, dtype=torch.float64)
    return (shared + own) * spread + torch.tensor([[3.0], [-8.0]], dtype=torch.float64)


def _plain(z_NVD: torch.Tensor) -> torch.Tensor:
    """Equations 1 to 6, number by number."""
    images, _, dim = z_NVD.shape
    apart = sum((row[0] - row[1]).square().sum() for row in z_NVD) / (images * dim)
    lacking, together = torch.zeros(()), torch.zeros(())
    for view in (0, 1):
        z_ND = z_NVD[:, view]
        for j in range(dim):
            lacking = lacking + (1 - (z_ND[:, j].var() + 1e-4).sqrt()).clamp(min=0) / dim
        centred = z_ND - z_ND.mean(0)
        for i in range(dim):
            for j in range(dim):
                covariance = (centred[:, i] * centred[:, j]).sum() / (images - 1)
                together = together + (covariance.square() / dim if i != j else 0)
    return 3 * apart + 7 * lacking / 2 + 2 * together


def _loss(z_NVD: torch.Tensor, **settings: Any) -> Loss:
    objective = VICReg(None, None, VICRegConfig(**settings))  # type: ignore[arg-type]
    return objective.loss(Outputs({"projections": z_NVD}), 0)


def _on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    own = _projections().chunk(world_size)[rank].clone().requires_grad_()
    loss = _loss(own, **WEIGHTS)
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


def test_what_has_collapsed_pays_for_its_variance_alone() -> None:
    """The epsilon under the root leaves a deviation of 0.01."""
    assert _loss(torch.ones(8, 2, 4)).value == pytest.approx(25 * 0.99)
    assert _loss(torch.ones(8, 2, 4)).metrics["deviation"] == pytest.approx(0.01)


def test_equal_views_of_uncorrelated_dimensions_that_vary_cost_nothing() -> None:
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    same = signs[1:].T.double()[:, None].expand(-1, 2, -1)  # rows of a Hadamard matrix
    assert _loss(same).value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_rows_are_judged_in_float32(dtype: torch.dtype) -> None:
    rows = _projections().to(dtype)
    found = _loss(rows, **WEIGHTS).value
    assert found.dtype == torch.float32
    # Float32's rounding of a mean of 8 is 5e-7, of deviations of 0.1 and more.
    torch.testing.assert_close(found.double(), _plain(rows.double()), rtol=2e-5, atol=0)


def test_a_plan_counts_the_matrices_that_processes_add_up() -> None:
    config = small(batch=1024, objective=VICRegConfig())
    cost, dim = plan(config, gpus=8), config.head.out_dim
    assert flow(cost, "correlations").nvlink_bytes == pytest.approx(2 * 2 * 4 * dim**2 * 7 / 8)
    assert not [each for each in cost.flows if each.part in ("embeddings", "log-sum-exps")]
