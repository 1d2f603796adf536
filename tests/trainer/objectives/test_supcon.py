"""Supervised contrastive learning: the paper's sum over pairs, without the pairs."""

import pytest
import torch
from torch.nn.functional import normalize

from common.errors import ConfigError
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Outputs
from trainer.objectives.simclr import SimCLR, SimCLRConfig
from trainer.objectives.supcon import SupCon, SupConConfig

HEAD = HeadConfig(hidden_dim=64, out_dim=32)


def _objective(temperature: float = 0.1, classes: int = 4) -> SupCon:
    config = SupConConfig(temperature=temperature, loss_implementation="reference")
    return SupCon(small_encoder(), ProjectionHead(64, HEAD), config, classes)  # type: ignore[arg-type]


def _by_pairs(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equation 2 as it stands, anchor by anchor; a label of -1 is shared by an image's views."""
    images = len(labels)
    own = torch.where(labels < 0, -1 - torch.arange(images), labels).repeat(2)
    rows = normalize(torch.cat([z[:, 0], z[:, 1]]), dim=1)
    total = rows.new_zeros(())
    for i in range(2 * images):
        others = [a for a in range(2 * images) if a != i]
        positives = [a for a in others if own[a] == own[i]]
        logits = rows[others] @ rows[i] / temperature
        right = torch.stack([rows[p] @ rows[i] for p in positives]) / temperature
        total = total + logits.logsumexp(0) - right.mean()
    return total / (2 * images)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 0, 1], [2, 2, 2, 2, 2, 2], [0, 1, -1, 1, -1, 1], [-1] * 6]
)
def test_loss_and_gradient_are_those_of_all_pairs(labels: list[int], temperature: float) -> None:
    z = torch.randn(6, 2, 32, dtype=torch.float64, requires_grad=True)
    labels_N = torch.tensor(labels)
    outputs = Outputs({"projections": z}, {"labels": labels_N})
    value = _objective(temperature).loss(outputs, 0).value
    expected = _by_pairs(z, labels_N, temperature)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (ours,) = torch.autograd.grad(value, z)
    (theirs,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_shared_labels_it_is_simclr() -> None:
    z = torch.randn(4, 2, 32, dtype=torch.float64)
    outputs = Outputs({"projections": z}, {"labels": torch.arange(4)})
    config = SimCLRConfig(temperature=0.1, loss_implementation="reference")
    simclr = SimCLR(small_encoder(), ProjectionHead(64, HEAD), config)  # type: ignore[arg-type]
    expected = float(simclr.loss(outputs, 0).value)
    assert float(_objective().loss(outputs, 0).value) == pytest.approx(expected, rel=1e-12)


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs labels of two classes"):
        SupConConfig().build(small_encoder(), HEAD, Given(num_classes=0))  # type: ignore[arg-type]
