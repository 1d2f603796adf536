"""Rotation: all four turns, without a trace of how they were made."""

import pytest
import torch
from torch import nn

from trainer.objectives.base import Inputs
from trainer.objectives.rotation import Rotation, RotationConfig


class _Seen(nn.Module):
    """Keeps what it is given; its features are each image's sum."""

    feature_dim = 3

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        self.images = images_NCHW
        return images_NCHW.mean((2, 3))


def _turned() -> tuple[torch.Tensor, _Seen, Rotation, torch.Tensor]:
    images = torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)
    encoder = _Seen()
    objective = Rotation(encoder, RotationConfig())  # type: ignore[arg-type]
    ids = torch.arange(5)
    outputs = objective(Inputs((images[None],), ids, ids >= 0))
    return images, encoder, objective, outputs.rows["logits"]


def test_every_image_is_shown_in_its_four_turns_to_the_pixel() -> None:
    images, encoder, _, logits = _turned()
    assert logits.shape == (5, 4, 4)
    seen = encoder.images.view(4, 5, 3, 8, 8)
    assert encoder.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[0], images)
    for turn in range(4):
        # Four quarters make a whole, and no pixel is new or lost.
        assert torch.equal(seen[turn].rot90(4 - turn, (2, 3)), images)
        assert torch.equal(seen[turn].flatten(1).sort().values, images.flatten(1).sort().values)


def test_a_turn_is_told_from_the_others_by_its_place() -> None:
    _, _, objective, logits = _turned()
    right = torch.eye(4).expand_as(logits) * 50
    outputs = objective(Inputs((torch.zeros(1, 5, 3, 8, 8),), torch.arange(5), torch.ones(5) > 0))
    loss = objective.loss(outputs._replace(rows={"logits": right}), 0)
    assert loss.value == pytest.approx(0, abs=1e-6)
    assert loss.metrics["rotation_top1"] == 1
    wrong = objective.loss(outputs._replace(rows={"logits": right.roll(1, 2)}), 0)
    assert wrong.metrics["rotation_top1"] == 0


def test_flip_and_turn_do_not_commute_so_that_the_flip_comes_first() -> None:
    """After a turn a flip would make 90 degrees look like 270: why views are flipped before."""
    image = torch.randn(3, 6, 6)
    assert torch.equal(image.rot90(1, (1, 2)).flip(2), image.flip(2).rot90(3, (1, 2)))
