"""BYOL's, SimSiam's and VICReg's losses and gradients beside lightly's."""

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, VICRegLoss

from trainer.objectives.base import Outputs
from trainer.objectives.byol import BYOL
from trainer.objectives.simsiam import SimSiam
from trainer.objectives.vicreg import VICReg, VICRegConfig

IMAGES, DIM = 64, 32


def _rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, 2, DIM, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_similarities_are_lightlys(name: str) -> None:
    predictions, targets = _rows(0).requires_grad_(), _rows(1)
    theirs = NegativeCosineSimilarity()
    one, other = (theirs(predictions[:, v], targets[:, 1 - v]) for v in (0, 1))
    # Their BYOL minimises the mean of the two; the paper's distance is 2 + 2 of each.
    expected = 4 + 2 * (one + other) if name == "byol" else (one + other) / 2
    kind, fixed = (BYOL, "keys") if name == "byol" else (SimSiam, "projections")
    outputs = Outputs({"predictions": predictions}, {fixed: targets})
    found = kind.loss(object.__new__(kind), outputs, 0).value
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each, predictions)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_vicreg_is_lightlys() -> None:
    rows = (0.5 * _rows(0)).requires_grad_()
    objective = VICReg(None, None, VICRegConfig())  # type: ignore[arg-type]
    found = objective.loss(Outputs({"projections": rows}), 0).value
    expected = VICRegLoss()(rows[:, 0], rows[:, 1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each, rows)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
