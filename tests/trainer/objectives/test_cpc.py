"""Predictive coding: masks, places, and a loss over all patches of all images."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from tests.trainer.runs import inputs_of
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.base import Given
from trainer.objectives.cpc import CPC, CPCConfig
from trainer.objectives.parts.context import Context, Predictions, cut_patches

SIDE = 32
LAYER_NORM = EncoderConfig(name="resnet8", stem="cifar", norm="layer")


def _objective(**settings: object) -> CPC:
    torch.manual_seed(0)
    config = CPCConfig(**{"patch": 8, "dim": 16, **settings})  # type: ignore[arg-type]
    return config.build(build_encoder(LAYER_NORM), None, Given(side=SIDE)).double()  # type: ignore[arg-type]


def test_patches_overlap_by_half_and_lie_in_reading_order() -> None:
    images = torch.arange(2 * 3 * 32 * 32.0).view(2, 3, 32, 32)
    patches = cut_patches(images, 8)
    assert patches.shape == (2, 49, 3, 8, 8)
    for number in (0, 6, 7, 48):
        row, column = divmod(number, 7)
        expected = images[:, :, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8]
        assert torch.equal(patches[:, number], expected)


def test_no_context_sees_a_row_below_its_own() -> None:
    context = Context(12).double()
    z = torch.randn(2, 12, 7, 7, dtype=torch.float64)
    before = context(z)
    for row in range(7):
        moved = z.clone()
        moved[:, :, row] += 1
        changed = (context(moved) != before).any(3).any(1).any(0)
        assert not changed[:row].any()
        # Its own row, and as many below as there are blocks.
        assert changed[row : row + 6].all()


@pytest.mark.parametrize("sides", [1, 4])
def test_predictions_are_of_patches_that_stand_so_far_below_in_their_side(sides: int) -> None:
    """Networks that say nothing but where they stand: what is meant lies the offset further."""
    predictions = Predictions(2, 2, 7, (3, 5), sides)
    predictions.context = nn.Identity()  # type: ignore[assignment]
    for layer in predictions.layers:
        layer.weight.data = torch.eye(2)[:, :, None, None]  # type: ignore[operator, union-attr]
        layer.bias.data.zero_()  # type: ignore[operator, union-attr]
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    said = predictions(torch.stack([rows, columns])[None])[0]
    meant = torch.stack([rows, columns], -1).view(49, 2)[predictions.meant]
    downwards = torch.tensor([[1, 0], [0, -1], [-1, 0], [0, 1]])[:sides]
    steps = {tuple(step) for step in (meant - said).int().tolist()}
    quarter_turns = {tuple((k * each).tolist()) for k in (3, 5) for each in downwards}
    assert steps == quarter_turns
    assert len(said) == sides * 7 * (4 + 2)


def test_loss_and_gradient_are_those_of_the_whole_matrix() -> None:
    objective = _objective(temperature=0.2, nearest=2, furthest=4)
    outputs = objective(inputs_of(torch.randn(1, 3, 3, SIDE, SIDE, dtype=torch.float64)))
    rows = {name: each.detach().requires_grad_() for name, each in outputs.rows.items()}
    loss = objective.loss(outputs._replace(rows=rows), 0)
    ours = torch.autograd.grad(loss.value, list(rows.values()))
    said, patches = (normalize(each, dim=2) for each in rows.values())
    logits = said.flatten(0, 1) @ patches.flatten(0, 1).T / 0.2
    right = (49 * torch.arange(3)[:, None] + objective.predictions.meant).flatten()
    expected = nn.functional.cross_entropy(logits, right)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(loss.metrics["cpc_top1"]) == pytest.approx(
        float((logits.argmax(1) == right).double().mean())
    )
    for mine, other in zip(ours, torch.autograd.grad(expected, list(rows.values()))):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_one_image_does_not_change_another() -> None:
    """As BatchNorm would."""
    objective = _objective(colours="keep").train()
    images = torch.randn(1, 2, 3, SIDE, SIDE, dtype=torch.float64)
    before = objective(inputs_of(images)).rows["targets"]
    images[0, 0] += 1
    after = objective(inputs_of(images)).rows["targets"]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


def test_an_encoder_with_batch_norm_is_refused() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    with pytest.raises(ConfigError, match=r"set --encoder\.norm layer"):
        CPCConfig(patch=8).build(encoder, None, Given(side=SIDE))  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "patch"), [(32, 16), (30, 8), (33, 9)])
def test_sizes_that_do_not_go_together_are_refused(side: int, patch: int) -> None:
    with pytest.raises(ConfigError, match=rf"--crop\.size {side} .* --objective\.patch {patch}"):
        CPCConfig(patch=patch).views(CropConfig(size=side), AugmentConfig())
    assert CPCConfig(patch=8).views(CropConfig(size=32), AugmentConfig())
