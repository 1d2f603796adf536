"""iBOT: which patches are hidden, what they are to say, and that the rest is DINO's."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.trainer.runs import small_encoder, small_vit
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.ibot import IBOT, IBOTConfig
from trainer.objectives.parts.masks import BLOCK_DRAWS, block_order
from trainer.objectives.parts.tokens import all_tokens

IMAGES, KINDS, DIM, PATCHES = 12, 7, 16, 16
HEAD = HeadConfig(layers=3, hidden_dim=32, out_dim=DIM, hidden_norm="none", last_norm="none")


def _objective(**settings: Any) -> IBOT:
    torch.manual_seed(0)
    encoder: Any = small_vit().double()
    encoder.feature_dim = 32
    settings = {"small_views": 1, "hidden": (0.1, 0.4), "teacher_warmup_steps": 10, **settings}
    config = IBOTConfig(directions=KINDS, **settings)
    objective = config.build(encoder, HEAD, Given(seed=3, side=32)).double()
    objective.patch_centre.copy_(torch.linspace(-0.2, 0.1, KINDS))
    return objective


def _inputs(step: int = 0, images: int = IMAGES) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    views = tuple(
        torch.randn(count, images, 3, side, side, generator=generator, dtype=torch.float64)
        for count, side in ((2, 32), (1, 16))
    )
    ids = 3 * torch.arange(images)
    return Inputs(views, ids, ids >= 0, step)


# --- which patches ---


def test_hidden_patches_are_blocks_of_any_number() -> None:
    """Of four neighbours, more are hidden with a patch than chance would have it."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(200, BLOCK_DRAWS, generator=generator, dtype=torch.float64)
    order = block_order(draws, 14)
    assert torch.equal(order.sort(1).values, torch.arange(196).expand(200, -1))
    hidden = torch.zeros(200, 196, dtype=torch.bool).scatter(1, order[:, :59], True)  # 30 %
    grid = hidden.view(200, 14, 14)
    pairs = (grid[:, 1:] & grid[:, :-1]).sum() / (grid[:, 1:].sum())
    assert float(pairs) > 0.8, "by chance 0.3"
    assert float(hidden.double().mean(0).min()) > 0.05, "every place is hidden at times"


def test_as_many_are_hidden_as_drawn_in_half_of_the_views() -> None:
    counts = []
    for step in range(20):
        chosen = _objective().hidden_patches(_inputs(step))
        hidden = chosen.is_hidden_RP
        counts += hidden.sum(1).tolist()
        for row in range(len(hidden)):
            count = int(hidden[row].sum())
            weights = [1 / count] * count + [0.0] * (6 - count) if count else [0.0] * 6
            torch.testing.assert_close(chosen.weight_RM[row], torch.tensor(weights).double())
            assert set(chosen.asked_RM[row, :count].tolist()) == set(
                hidden[row].nonzero()[:, 0].tolist()
            )
    masked = [count for count in counts if count]
    assert 0.4 < len(masked) / len(counts) < 0.6
    assert (min(masked), max(masked)) == (2, 6)  # 0.1 and 0.4 of 16


def test_what_is_hidden_hangs_on_step_sample_and_view() -> None:
    objective = _objective()
    first, later = (objective.hidden_patches(_inputs(step)).is_hidden_RP for step in (0, 1))
    assert not torch.equal(first, later)
    alone = objective.hidden_patches(_inputs()._replace(ids_N=torch.tensor([9]))).is_hidden_RP
    assert torch.equal(alone, first[[3, IMAGES + 3]])


# --- what they see and say ---


def test_a_hidden_patch_changes_nothing_and_others_see_it_by_its_place_alone() -> None:
    objective = _objective(hidden_views=1.0).eval()
    inputs = _inputs()
    outputs = objective(inputs)
    chosen = objective.hidden_patches(inputs)
    noise = torch.randn(2 * IMAGES, 3, 32, 32).double()
    pixels = chosen.is_hidden_RP.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    large = inputs.views[0].flatten(0, 1)
    altered = torch.where(pixels, noise, large).unflatten(0, (2, IMAGES))
    found = objective(inputs._replace(views=(altered, inputs.views[1])))
    for name in ("cosines", "patches"):
        torch.testing.assert_close(found.rows[name], outputs.rows[name])
    # A control: the average sees all.
    assert not torch.allclose(found.fixed["taught_patches"], outputs.fixed["taught_patches"])


def test_patches_are_taught_by_the_average_of_what_it_sees() -> None:
    objective = _objective().eval()
    with torch.no_grad():
        objective.key.head.directions.weight.add_(0.01 * torch.randn(KINDS, DIM))
    inputs = _inputs()
    chosen, outputs = objective.hidden_patches(inputs), objective(inputs)
    head = objective.key.head
    for view in (0, 1):
        tokens = all_tokens(objective.encoder, inputs.views[0][view])
        for image in range(IMAGES):
            asked = chosen.asked_RM[view * IMAGES + image]
            unit = normalize(head.projector(tokens[image, 1 + asked]))
            expected = unit @ normalize(head.directions.weight).T
            torch.testing.assert_close(outputs.fixed["taught_patches"][image, view], expected)


def test_tokens_are_those_of_the_encoder_itself() -> None:
    encoder: Any = small_vit().double().eval()
    images = torch.randn(3, 3, 32, 32).double()
    torch.testing.assert_close(all_tokens(encoder, images)[:, 0], encoder(images))
    assert not encoder.encoder._forward_hooks and not encoder.encoder._forward_pre_hooks


# --- the loss ---


def _outputs(rank: int = 0, world_size: int = 1) -> Outputs:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        drawn = torch.rand(IMAGES, *shape, generator=generator, dtype=torch.float64) * 2 - 1
        return drawn.chunk(world_size)[rank].clone()

    shown = {"cosines": rows(3, KINDS), "patches": rows(2, 6, KINDS).requires_grad_()}
    taught = {"taught": rows(2, KINDS), "taught_patches": rows(2, 6, KINDS)}
    counts = torch.arange(2 * IMAGES).view(IMAGES, 2) % 7
    weights = (torch.arange(6) < counts[..., None]) / counts.clamp(min=1)[..., None].double()
    return Outputs(shown, {**taught, "weights": weights.chunk(world_size)[rank]})


def _plain(outputs: Outputs, temperature: float) -> torch.Tensor:
    """Equation 3, patch by patch: the mean over hidden ones, then views, then images."""
    centre = torch.linspace(-0.2, 0.1, KINDS).double()
    total = torch.zeros((), dtype=torch.float64)
    for image in range(IMAGES):
        for view in (0, 1):
            hidden = [m for m in range(6) if outputs.fixed["weights"][image, view, m] > 0]
            for m in hidden:
                taught = outputs.fixed["taught_patches"][image, view, m]
                target = ((taught - centre) / temperature).softmax(0)
                logs = (outputs.rows["patches"][image, view, m] / 0.1).log_softmax(0)
                total = total - (target * logs).sum() / len(hidden)
    return total / (2 * IMAGES)


def _on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    objective, outputs = _objective(), _outputs(rank, world_size)
    found = objective.loss(outputs, 5)
    found.value.backward()
    objective.after_step(outputs, 5, 100, torch.zeros(()))
    return {
        "value": found.metrics["patch_loss"],
        "gradient": outputs.rows["patches"].grad,  # type: ignore[dict-item]
        "centre": objective.patch_centre,
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_patches_loss_is_the_papers_on_any_number_of_processes(world_size: int) -> None:
    outputs = _outputs()
    expected = _plain(outputs, temperature=0.055)
    (gradient,) = torch.autograd.grad(expected, outputs.rows["patches"])
    found = run_ranks(_on_a_rank, world_size)
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    torch.testing.assert_close(rows, gradient, rtol=1e-8, atol=1e-12)
    mean = outputs.fixed["taught_patches"].mean((0, 1, 2))
    centre = 0.9 * torch.linspace(-0.2, 0.1, KINDS).double() + 0.1 * mean
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach())
        # The buffer was filled with float32's numbers.
        torch.testing.assert_close(each["centre"], centre, rtol=1e-6, atol=1e-8)


def test_the_weight_is_of_the_patches_alone() -> None:
    outputs = _outputs()
    without, twice = (_objective(patch_weight=w).loss(outputs, 5) for w in (0.0, 2.0))
    torch.testing.assert_close(twice.value - without.value, 2 * twice.metrics["patch_loss"])


def test_a_skipped_step_moves_no_centre() -> None:
    objective = _objective()
    before = objective.patch_centre.clone()
    objective.after_step(_outputs(), 5, 100, torch.ones(()))
    assert torch.equal(objective.patch_centre, before)


def test_a_resnet_is_refused() -> None:
    encoder: Any = small_encoder()
    with pytest.raises(
        ConfigError, match=r"iBOT needs a vision transformer \(vit_s_16, .* is DINO"
    ):
        IBOTConfig().build(encoder, HEAD, Given())
    with pytest.raises(ConfigError, match=r"--objective.hidden 0.5 0.1: the least comes first"):
        IBOTConfig(hidden=(0.5, 0.1))
