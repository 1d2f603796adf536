"""Masked autoencoder: the encoder sees a quarter, and the loss is that of the rest."""

import pytest
import torch
from torch.nn.functional import fold

from common.errors import ConfigError
from tests.trainer.runs import small_vit
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.base import Given, Inputs
from trainer.objectives.mae import MAE, MAEConfig

SIDE, PATCH = 32, 8


def _objective(**settings: object) -> MAE:
    torch.manual_seed(0)
    config = MAEConfig(**{"width": 32, "depth": 1, **settings})  # type: ignore[arg-type]
    return MAE(small_vit(), config, Given(side=SIDE)).double()  # type: ignore[arg-type]


def _inputs(images: torch.Tensor, step: int = 3, first: int = 5) -> Inputs:
    ids = torch.arange(len(images)) + first
    return Inputs((images[None],), ids, torch.ones_like(ids, dtype=torch.bool), step)


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 12), (0.5, 8), (0.01, 1), (0.99, 15)])
def test_as_many_patches_of_each_image_are_hidden_and_its_own(ratio: float, hidden: int) -> None:
    objective, images = _objective(ratio=ratio), _images(30)
    masks = objective(_inputs(images)).fixed["hidden"]
    assert (masks.sum(1) == hidden).all()
    assert len(masks.unique(dim=0)) > 8
    assert torch.equal(objective(_inputs(images[20:22], first=25)).fixed["hidden"], masks[20:22])
    assert not torch.equal(objective(_inputs(images, step=4)).fixed["hidden"], masks)


def _pixels(patches: torch.Tensor) -> torch.Tensor:
    return fold(patches.transpose(1, 2), SIDE, PATCH, stride=PATCH)


def test_patches_are_the_image() -> None:
    images = _images(2)
    outputs = _objective()(_inputs(images))
    assert torch.equal(_pixels(outputs.fixed["patches"]), images)


def test_what_is_hidden_reaches_the_decoder_in_no_way_and_what_is_seen_does() -> None:
    objective, images = _objective().eval(), _images(4)
    outputs = objective(_inputs(images))
    hidden = _pixels(outputs.fixed["hidden"][..., None].expand(-1, -1, 192).double()) > 0
    changed = torch.where(hidden, torch.randn_like(images), images)
    again = objective(_inputs(changed)).rows["patches"]
    assert torch.equal(again, outputs.rows["patches"])
    changed = torch.where(hidden, images, torch.randn_like(images))
    again = objective(_inputs(changed)).rows["patches"]
    assert ((again - outputs.rows["patches"]).abs().amax((1, 2)) > 1e-3).all()


def test_a_place_is_decoded_where_it_lies() -> None:
    """Tokens without anything of their own but their places: decoded patches differ by these."""
    objective = _objective().eval()
    with torch.no_grad():
        objective.decoder.narrow.weight.zero_()
        objective.decoder.narrow.bias.copy_(objective.decoder.hidden.flatten())
    outputs = objective(_inputs(_images(3)))
    first, *others = outputs.rows["patches"]
    for other in others:
        assert torch.allclose(other, first, atol=1e-12)
    assert ((first[:, None] - first).abs().amax(2) > 1e-6).sum() == 16 * 15


@pytest.mark.parametrize("standardised", [True, False])
def test_the_loss_is_that_of_hidden_patches_alone(standardised: bool) -> None:
    objective = _objective(standardised=standardised)
    outputs = objective(_inputs(_images(3)))
    decoded = outputs.rows["patches"].detach().requires_grad_()
    loss = objective.loss(outputs._replace(rows={"patches": decoded}), 0).value
    wanted = outputs.fixed["patches"]
    if standardised:
        wanted = (wanted - wanted.mean(2, keepdim=True)) / wanted.std(2, keepdim=True)
    hidden = outputs.fixed["hidden"]
    expected = float((decoded.detach() - wanted).square()[hidden].mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)  # 1e-6 in a variance
    (gradient,) = torch.autograd.grad(loss, decoded)
    assert not gradient[~hidden].any()
    assert gradient[hidden].all()


def test_the_encoder_is_left_as_it_was() -> None:
    objective, images = _objective().eval(), _images(2)
    features = objective.encoder(images)
    objective(_inputs(images))
    assert torch.equal(objective.encoder(images), features)


def test_others_than_transformers_are_refused() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    with pytest.raises(ConfigError, match="inpainting"):
        MAEConfig().build(encoder, None, Given(side=SIDE))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="multiple of 32"):
        MAEConfig(width=48)
