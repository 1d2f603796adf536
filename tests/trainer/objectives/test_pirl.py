"""PIRL: two branches against one bank, which remembers the image alone."""

from typing import Any

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.pirl import PIRL, PIRLConfig

IMAGES, SAMPLES, DIM, SIDE = 6, 40, 16, 30
HEAD = HeadConfig(layers=1, out_dim=DIM, last_norm="none")
GIVEN = Given(seed=3, num_samples=SAMPLES)


def _objective(**settings: Any) -> PIRL:
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    settings = {"negatives": 20, "tile": 8, "temperature": 0.2, **settings}
    crop = CropConfig(size=SIDE)
    config = PIRLConfig(second_crop=crop, loss_implementation="reference", **settings)
    return config.build(encoder, HEAD, GIVEN).double()  # type: ignore[arg-type]


def _inputs(step: int = 0, images: int = IMAGES) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randn(1, images, 3, side, side, generator=generator, dtype=torch.float64)
        for side in (32, SIDE)
    )
    ids = torch.arange(images) * 3
    return Inputs((first, second), ids, ids >= 0, step)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_weighs_both_branches_against_the_same_rows(weight: float) -> None:
    objective = _objective(weight=weight)
    outputs = objective(_inputs())
    bank, ids = objective.bank.rows, outputs.fixed["ids"]
    # float32's when they were normalised; positives are again.
    own, columns = nn.functional.normalize(bank[ids]), bank[objective._negatives(4)]
    losses = []
    for name in ("projections", "transformed"):
        unit = nn.functional.normalize(outputs.rows[name])
        logits = torch.cat([(unit * own).sum(1, keepdim=True), unit @ columns.T], 1) / 0.2
        losses.append(nn.functional.cross_entropy(logits, torch.zeros(IMAGES, dtype=torch.int64)))
    expected = (1 - weight) * losses[0] + weight * losses[1]
    torch.testing.assert_close(objective.loss(outputs, 4).value, expected, rtol=1e-10, atol=0)


def test_the_bank_remembers_the_image_and_not_what_became_of_it() -> None:
    objective = _objective()
    outputs = objective(_inputs())
    other = outputs._replace(rows={**outputs.rows, "transformed": outputs.rows["transformed"] + 1})
    before = objective.bank.rows.clone()
    found = []
    for each in (outputs, other):
        objective.bank.rows.copy_(before)
        objective.after_step(each, 0, 10, torch.zeros(()))
        found.append(objective.bank.rows.clone())
    assert torch.equal(*found)
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    npid = NPIDConfig(negatives=20).build(encoder, HEAD, GIVEN).double()  # type: ignore[arg-type]
    npid.bank.rows.copy_(before)
    npid.after_step(outputs, 0, 10, torch.zeros(()))
    assert torch.equal(npid.bank.rows, found[0])


class _Corner(nn.Module):
    """The features of an image are its first pixel's three numbers."""

    feature_dim = 3

    def forward(self, images_RCHW: torch.Tensor) -> torch.Tensor:
        return images_RCHW[:, :, 0, 0]


def _seen(transform: str, images: torch.Tensor, step: int = 0) -> PIRL:
    config = PIRLConfig(transform=transform, tile=SIDE // 3, second_crop=CropConfig(size=SIDE))  # type: ignore[arg-type]
    head = HeadConfig(layers=1, out_dim=3, last_norm="none")
    objective = config.build(_Corner(), head, GIVEN)  # type: ignore[arg-type]
    with torch.no_grad():
        objective.second_head.weight.copy_(torch.eye(3))
        objective.second_head.bias.zero_()
    return objective


def test_a_jigsaw_shows_every_tile_once_in_every_order_alike_often() -> None:
    count = 3000
    places = torch.arange(9.0).view(3, 3).repeat_interleave(10, 0).repeat_interleave(10, 1)
    images = places.expand(1, count, 3, SIDE, SIDE)
    objective = _seen("jigsaw", images)
    objective.of_tiles = nn.Identity()  # type: ignore[assignment]
    ids = torch.arange(count)
    shown = objective._jigsaw(Inputs((images, images), ids, ids >= 0)).view(count, 9, 3)[..., 0]
    assert torch.equal(shown.sort(1).values, torch.arange(9.0).expand(count, 9))
    later = objective._jigsaw(Inputs((images, images), ids, ids >= 0, 1)).view(count, 9, 3)[..., 0]
    assert (shown != later).any(1).double().mean() > 0.99
    counts = torch.stack([(shown == tile).sum(0) for tile in range(9)]).double()
    # Five deviations of a binomial count.
    assert (counts - count / 9).abs().max() < 5 * (count * 8 / 81) ** 0.5


def test_an_image_is_turned_by_each_angle_alike_often() -> None:
    count = 4000
    corners = torch.zeros(3, SIDE, SIDE)
    corners[:, 0, 0], corners[:, 0, -1], corners[:, -1, -1], corners[:, -1, 0] = 0.0, 1.0, 2.0, 3.0
    images = corners.expand(1, count, 3, SIDE, SIDE)
    ids = torch.arange(count)
    found = _seen("rotation", images)._turned(Inputs((images, images), ids, ids >= 0))[:, 0]
    counts = torch.bincount(found.round().long(), minlength=4).double()
    assert (counts - count / 4).abs().max() < 5 * (count * 3 / 16) ** 0.5


def test_each_branch_has_a_view_of_its_own() -> None:
    config = PIRLConfig(second_crop=CropConfig(size=SIDE), tile=8)
    augment = AugmentConfig()
    first, second = config.views(CropConfig(size=32), augment)
    assert (first.crop.size, first.looks) == (32, (augment.view1,))
    assert (second.crop.size, second.looks) == (SIDE, (augment.view2,))


def test_a_size_that_has_no_cells_is_refused_by_its_own_name() -> None:
    config = PIRLConfig(second_crop=CropConfig(size=32), tile=8)
    with pytest.raises(ConfigError, match=r"--objective.second-crop.size 32 does not divide"):
        config.views(CropConfig(size=32), AugmentConfig())
