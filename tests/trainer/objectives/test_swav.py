"""SwAV: codes over the global batch and a queue, prototypes on the sphere, views that meet."""

from typing import Any

import pytest
import torch

from tests.dist import run_ranks
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.parts.prototypes import Prototypes, sinkhorn
from trainer.objectives.swav import SwAV, SwAVConfig

IMAGES, VIEWS, KINDS, DIM = 12, 4, 5, 16
EPSILON = 0.05


def _cosines(images: int = IMAGES, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (images, VIEWS, KINDS)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.8


def _plain_sinkhorn(scores_BK: torch.Tensor, iterations: int) -> torch.Tensor:
    """Appendix A.1, as it stands there: K x B."""
    q_KB = (scores_BK / EPSILON).exp().T
    q_KB = q_KB / q_KB.sum()
    kinds, images = q_KB.shape
    for _ in range(iterations):
        q_KB = q_KB / q_KB.sum(1, keepdim=True) / kinds
        q_KB = q_KB / q_KB.sum(0, keepdim=True) / images
    return (q_KB * images).T


def _plain(cosines_NVK: torch.Tensor, queued: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Equations 2 and 6, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    images = len(cosines_NVK)
    for view in (0, 1):
        scores = cosines_NVK[:, view].detach()
        if queued is not None:
            scores = torch.cat([scores, queued[view]])
        codes = _plain_sinkhorn(scores, 3)[:images]
        for image in range(images):
            for other in range(VIEWS):
                if other != view:
                    logs = (cosines_NVK[image, other] / 0.1).log_softmax(0)
                    total = total - (codes[image] * logs).sum() / (VIEWS - 1)
    return total / (2 * images)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_are_the_papers(iterations: int) -> None:
    scores = _cosines()[:, 0]
    found = sinkhorn(scores, EPSILON, iterations)
    torch.testing.assert_close(found, _plain_sinkhorn(scores, iterations), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(1), torch.ones(IMAGES, dtype=torch.float64))
    # What is added to all cosines changes nothing.
    torch.testing.assert_close(sinkhorn(scores + 0.7, EPSILON, iterations), found)


def test_prototypes_get_equal_shares_in_the_end() -> None:
    scores = _cosines(200)[:, 0] + torch.linspace(0, 0.2, KINDS, dtype=torch.float64)
    few, many = (sinkhorn(scores, EPSILON, count).sum(0) / 40 for count in (1, 100))
    assert (many - 1).abs().max() < 1e-6
    assert (few - 1).abs().max() > 0.01


def test_a_narrow_code_of_far_cosines_is_finite() -> None:
    scores = torch.full((4, 3), -1.0)
    scores[0, 0] = 1
    found = sinkhorn(scores, 0.003, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))


def _objective(**settings: Any) -> SwAV:
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    config = SwAVConfig(prototypes=KINDS, epsilon=EPSILON, small_views=VIEWS - 2, **settings)
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=DIM, last_norm="none")
    return config.build(encoder, head, Given()).double()  # type: ignore[arg-type]


def _on_a_rank(rank: int, world_size: int, queue: int) -> dict[str, torch.Tensor]:
    objective = _objective(queue=queue)
    own = _cosines().chunk(world_size)[rank].clone().requires_grad_()
    loss = objective.loss(Outputs({"cosines": own}), step=10)
    loss.value.backward()
    return {"value": loss.value.detach(), "gradient": own.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("queue", [0, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_are_the_papers_over_the_global_batch(
    world_size: int, queue: int
) -> None:
    objective, whole = _objective(queue=queue), _cosines().requires_grad_()
    queued = [objective.prototypes.of(each.rows) for each in objective.queues]  # type: ignore[arg-type]
    expected = _plain(whole, queued or None)
    (gradient,) = torch.autograd.grad(expected, whole)
    found = run_ranks(_on_a_rank, world_size, queue)
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    torch.testing.assert_close(rows, gradient, rtol=1e-10, atol=1e-14)
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach(), rtol=1e-12, atol=0)
    # The control: codes of each half alone are others.
    apart = torch.stack([_plain(half, queued or None) for half in _cosines().chunk(2)]).mean()
    assert (apart - expected).abs() > 1e-3


def test_a_queue_waits_until_it_is_full_and_asked_for() -> None:
    objective = _objective(queue=20, queue_from=1)
    values = {
        step: float(objective.loss(Outputs({"cosines": _cosines()}), step).value)
        for step in (0, 1, 2)
    }
    without = float(_plain(_cosines()))
    assert values[0] == values[1] == pytest.approx(without)  # 12 of 20 are there
    assert abs(values[2] - without) > 1e-4
    later = _objective(queue=20, queue_from=5)
    assert float(later.loss(Outputs({"cosines": _cosines()}), 4).value) == values[0]


def _inputs(step: int) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    views = tuple(
        torch.randn(2, 6, 3, side, side, generator=generator, dtype=torch.float64)
        for side in (32, 16)
    )
    ids = torch.arange(6)
    return Inputs(views, ids, ids >= 0, step)


def test_prototypes_are_frozen_for_the_steps_asked_for() -> None:
    objective = _objective(frozen_steps=3)
    for step, moves in ((0, False), (2, False), (3, True)):
        loss = objective.loss(objective(_inputs(step)), step).value
        (gradient,) = torch.autograd.grad(loss, objective.prototypes.weight)
        assert bool(gradient.any()) == moves


def test_a_step_pushes_both_queues_unless_it_is_skipped() -> None:
    objective = _objective(queue=10)
    outputs = objective(_inputs(0))
    before = [queue.rows.clone() for queue in objective.queues]  # type: ignore[union-attr, operator]
    objective.after_step(outputs, 0, 10, torch.ones(()))
    for rows, queue in zip(before, objective.queues):
        assert torch.equal(queue.rows, rows)  # type: ignore[arg-type]
    objective.after_step(outputs, 0, 10, torch.zeros(()))
    for view, queue in enumerate(objective.queues):
        assert torch.equal(queue.rows[:6], outputs.fixed["projections"][:, view])  # type: ignore[index]


def test_of_prototypes_their_direction_alone_counts() -> None:
    objective = _objective(queue=10)
    before = objective(_inputs(0)).rows["cosines"]
    queued = objective.prototypes.of(objective.queues[0].rows)  # type: ignore[arg-type]
    with torch.no_grad():
        objective.prototypes.weight.mul_(torch.linspace(0.5, 7, KINDS)[:, None])
    torch.testing.assert_close(objective(_inputs(0)).rows["cosines"], before)
    again = objective.prototypes.of(objective.queues[0].rows)  # type: ignore[arg-type]
    torch.testing.assert_close(again, queued)


def test_cosines_are_those_of_every_view_the_large_ones_first() -> None:
    objective = _objective().eval()
    outputs = objective(_inputs(0))
    large, small = _inputs(0).views
    for view, images in enumerate((*large, *small)):
        unit = torch.nn.functional.normalize(objective.head(objective.encoder(images)))
        expected = unit @ torch.nn.functional.normalize(objective.prototypes.weight).T
        torch.testing.assert_close(outputs.rows["cosines"][:, view], expected)


def test_prototypes_of_bfloat16_rows_are_told_apart_in_float32() -> None:
    prototypes = Prototypes(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototypes(torch.nn.functional.normalize(torch.randn(4, 8)))
    assert found.dtype == torch.float32
