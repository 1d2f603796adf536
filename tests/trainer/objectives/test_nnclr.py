"""NNCLR: neighbours of the queue, and predictions of the batch that meet them."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.dist import run_ranks
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.nnclr import NNCLR, NNCLRConfig

IMAGES, DIM, QUEUE, TEMPERATURE = 12, 16, 30, 0.1


def _objective() -> NNCLR:
    torch.manual_seed(0)
    encoder: Any = small_encoder()
    encoder.feature_dim = 64
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=DIM, last_norm="none")
    config = NNCLRConfig(queue=QUEUE, predictor=head)
    return config.build(encoder, head, Given()).double()


def _outputs(rank: int = 0, world_size: int = 1) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    predicted, projected = (
        torch.randn(IMAGES, 2, DIM, generator=generator, dtype=torch.float64)
        .chunk(world_size)[rank]
        .clone()
        for _ in range(2)
    )
    fixed = {"projections": normalize(projected, dim=2)}
    return Outputs({"predictions": predicted.requires_grad_()}, fixed)


def _plain(queue: torch.Tensor, outputs: Outputs) -> torch.Tensor:
    """Equation 5 with predictions, image by image."""
    predictions = normalize(outputs.rows["predictions"], dim=2)
    total = torch.zeros((), dtype=torch.float64)
    for view in (0, 1):
        for image in range(IMAGES):
            similarities = [float(outputs.fixed["projections"][image, view] @ row) for row in queue]
            neighbour = queue[similarities.index(max(similarities))]
            logits = predictions[:, 1 - view] @ neighbour / TEMPERATURE
            total = total - logits.log_softmax(0)[image]
    return total / (2 * IMAGES)


def _on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    objective, outputs = _objective(), _outputs(rank, world_size)
    value = objective.loss(outputs, 0).value
    value.backward()
    objective.after_step(outputs, 0, 10, torch.zeros(()))
    gradient = outputs.rows["predictions"].grad
    return {"value": value.detach(), "gradient": gradient, "queue": objective.queue.rows}  # type: ignore[dict-item]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_loss_gradient_and_queue_are_the_papers(world_size: int) -> None:
    outputs, queue = _outputs(), _objective().queue.rows.clone()
    expected = _plain(queue, outputs)
    (gradient,) = torch.autograd.grad(expected, outputs.rows["predictions"])
    found = run_ranks(_on_a_rank, world_size)
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    # The queue's rows were made in float32 and are normalised again: 2^-23 of a logit of ten.
    torch.testing.assert_close(rows, gradient, rtol=1e-5, atol=1e-8)
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(each["queue"][:IMAGES], outputs.fixed["projections"][:, 0])
        assert torch.equal(each["queue"][IMAGES:], queue[IMAGES:])


def test_neighbours_take_no_gradient_and_predictions_do() -> None:
    objective = _objective()
    views = torch.randn(2, IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.arange(IMAGES)
    outputs = objective(Inputs((views,), ids, ids >= 0))
    assert not outputs.fixed["projections"].requires_grad
    objective.loss(outputs, 0).value.backward()
    weights = [p.grad for p in objective.parameters()]
    assert all(each is not None and each.abs().sum() > 0 for each in weights)
