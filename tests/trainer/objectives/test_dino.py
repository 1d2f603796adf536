"""DINO: who teaches whom, how sharply, and what keeps it from collapsing."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.dist import run_ranks
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.dino import DINO, DINOConfig
from trainer.optim.schedule import ScheduleConfig, weight_decay_at

IMAGES, VIEWS, KINDS, DIM = 12, 4, 7, 16


def _rows(seed: int, views: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (IMAGES, views, KINDS)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def _objective(**settings: Any) -> DINO:
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    settings = {"teacher_warmup_steps": 10, "small_views": VIEWS - 2, **settings}
    config = DINOConfig(directions=KINDS, **settings)
    head = HeadConfig(layers=3, hidden_dim=32, out_dim=DIM, hidden_norm="none", last_norm="none")
    objective = config.build(encoder, head, Given()).double()  # type: ignore[arg-type]
    objective.centre.copy_(torch.linspace(-0.2, 0.1, KINDS))
    return objective


def _plain(cosines: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """Algorithm 1 and equation 3, image by image."""
    centre = torch.linspace(-0.2, 0.1, KINDS).double()
    total = torch.zeros((), dtype=torch.float64)
    for image in range(len(cosines)):
        for large in range(2):
            target = ((taught[image, large] - centre) / temperature).softmax(0)
            for view in range(VIEWS):
                if view != large:
                    total = total - (target * (cosines[image, view] / 0.1).log_softmax(0)).sum()
    return total / (len(cosines) * (2 * VIEWS - 2))


def _outputs(cosines: torch.Tensor, taught: torch.Tensor) -> Outputs:
    return Outputs({"cosines": cosines}, {"taught": taught})


def _on_a_rank(rank: int, world_size: int, step: int) -> dict[str, torch.Tensor]:
    objective = _objective()
    cosines, taught = (
        _rows(seed, views).chunk(world_size)[rank].clone() for seed, views in ((0, VIEWS), (1, 2))
    )
    outputs = _outputs(cosines.requires_grad_(), taught)
    value = objective.loss(outputs, step).value
    value.backward()
    objective.after_step(outputs, step, 100, torch.zeros(()))
    return {"value": value.detach(), "gradient": cosines.grad, "centre": objective.centre}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("world_size", "step", "temperature"), [(1, 0, 0.04), (1, 30, 0.07), (2, 5, 0.055)]
)
def test_loss_and_gradient_are_the_papers_and_the_centre_is_of_all_images(
    world_size: int, step: int, temperature: float
) -> None:
    cosines, taught = _rows(0, VIEWS).requires_grad_(), _rows(1, 2)
    expected = _plain(cosines, taught, temperature)
    (gradient,) = torch.autograd.grad(expected, cosines)
    found = run_ranks(_on_a_rank, world_size, step)
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    # The centre is float32 here: 2^-24 of a number below 1, over the temperature.
    torch.testing.assert_close(rows, gradient, rtol=1e-5, atol=1e-9)
    centre = 0.9 * torch.linspace(-0.2, 0.1, KINDS).double() + 0.1 * taught.mean((0, 1))
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(each["centre"].double(), centre, rtol=1e-6, atol=1e-8)
        assert torch.equal(each["centre"], found[0]["centre"])


def _inputs(step: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    views = tuple(
        torch.randn(2, 6, 3, side, side, generator=generator, dtype=torch.float64)
        for side in (32, 16)
    )
    ids = torch.arange(6)
    return Inputs(views, ids, ids >= 0, step)


def test_views_predict_and_the_average_teaches_of_the_large_ones_alone() -> None:
    objective = _objective().eval()
    with torch.no_grad():
        objective.key.head.directions.weight.add_(0.01 * torch.randn(KINDS, DIM))
    outputs = objective(_inputs())
    assert not outputs.fixed["taught"].requires_grad
    large, small = _inputs().views
    for view, images in enumerate((*large, *small)):
        for part, head, whose in (
            ("cosines", objective.student, outputs.rows),
            ("taught", objective.key.head, outputs.fixed),
        ):
            if part == "taught" and view > 1:
                continue
            unit = normalize(head.projector(objective.encoder(images)))
            expected = unit @ normalize(head.directions.weight).T
            torch.testing.assert_close(whose[part][:, view], expected)


def test_a_skipped_step_moves_neither_centre_nor_average() -> None:
    objective = _objective(momentum=0.5)
    outputs = objective(_inputs())
    with torch.no_grad():
        objective.student.directions.weight.add_(1)
    centre, average = objective.centre.clone(), objective.key.head.directions.weight.clone()
    for skipped, moves in ((1.0, False), (0.0, True)):
        objective.after_step(outputs, 0, 100, torch.tensor(skipped))
        assert (not torch.equal(objective.centre, centre)) == moves
        assert (not torch.equal(objective.key.head.directions.weight, average)) == moves


def test_the_last_layer_is_frozen_for_the_steps_asked_for() -> None:
    objective = _objective(frozen_steps=3)
    for step, moves in ((0, False), (2, False), (3, True)):
        loss = objective.loss(objective(_inputs(step)), step).value
        (gradient,) = torch.autograd.grad(loss, objective.student.directions.weight)
        assert bool(gradient.any()) == moves


def test_without_a_centre_all_would_be_taught_the_same() -> None:
    """A direction that is always ahead is taken off; what remains differs from image to image."""
    taught = _rows(1, 2) * 0.1
    taught[..., 3] += 0.8
    objective = _objective(centre_momentum=0.0)
    outputs = _outputs(_rows(0, VIEWS), taught)
    objective.centre.zero_()
    before = objective.loss(outputs, 30).metrics["entropy"]
    objective.after_step(outputs, 0, 100, torch.zeros(()))
    after = objective.loss(outputs, 30).metrics["entropy"]
    assert before < 0.01
    assert after > 10 * before


@pytest.mark.parametrize(("step", "expected"), [(0, 0.04), (50, 0.22), (100, 0.4), (1000, 0.4)])
def test_weight_decay_goes_by_a_cosine_to_where_it_ends(step: int, expected: float) -> None:
    config = ScheduleConfig(final_weight_decay=0.4)
    assert weight_decay_at(config, 0.04, step, 100) == pytest.approx(expected)
    assert weight_decay_at(ScheduleConfig(), 0.04, step, 100) is None
