"""Inpainting: so much is hidden, the encoder does not see it, and the loss sees nothing else."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.base import Given, Inputs
from trainer.objectives.inpainting import Inpainting, InpaintingConfig
from trainer.objectives.parts.masks import centre_mask

SIDE = 32


def _objective(**settings: object) -> Inpainting:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    config = InpaintingConfig(**{"patch": 8, **settings})  # type: ignore[arg-type]
    return Inpainting(encoder, config, Given(side=SIDE))


def _inputs(images: torch.Tensor, step: int = 3, first: int = 5) -> Inputs:
    ids = torch.arange(len(images)) + first
    return Inputs((images[None],), ids, torch.ones_like(ids, dtype=torch.bool), step)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.6, 0.99])
def test_every_image_has_as_many_hidden_patches_and_its_own(ratio: float) -> None:
    objective = _objective(ratio=ratio)
    images = torch.randn(50, 3, SIDE, SIDE)
    hidden = objective(_inputs(images)).fixed["hidden"][:, 0]
    patches = hidden.unflatten(1, (4, 8)).unflatten(3, (4, 8)).permute(0, 1, 3, 2, 4).flatten(3)
    assert (patches.any(3) == patches.all(3)).all()
    count = min(max(round(16 * ratio), 1), 15)
    assert (patches.all(3).sum((1, 2)) == count).all()
    assert len(hidden.unique(dim=0)) > 10
    one = objective(_inputs(images[20:22], first=25)).fixed["hidden"][:, 0]
    assert torch.equal(one, hidden[20:22])
    assert not torch.equal(objective(_inputs(images, step=4)).fixed["hidden"][:, 0], hidden)


def test_the_middle_is_a_quarter() -> None:
    mask = centre_mask(2, SIDE, torch.device("cpu"))
    assert (mask.sum((1, 2)) == SIDE**2 // 4).all()
    assert torch.equal(mask, mask.flip(1))
    assert torch.equal(mask, mask.flip(2))


@pytest.mark.parametrize("hidden", ["patches", "centre"])
def test_what_is_hidden_reaches_the_encoder_in_no_way(hidden: str) -> None:
    objective = _objective(hidden=hidden).eval()
    images = torch.randn(4, 3, SIDE, SIDE)
    outputs = objective(_inputs(images))
    changed = torch.where(outputs.fixed["hidden"], torch.randn_like(images), images)
    assert not torch.equal(changed, images)
    again = objective(_inputs(changed))
    assert torch.equal(outputs.rows["images"], again.rows["images"])


@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_that_of_hidden_pixels_alone(power: int) -> None:
    objective = _objective(power=power).double()
    outputs = objective(_inputs(torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)))
    decoded = outputs.rows["images"].detach().requires_grad_()
    loss = objective.loss(outputs._replace(rows={"images": decoded}), 0).value
    hidden = outputs.fixed["hidden"].expand_as(decoded)
    errors = (decoded - outputs.fixed["images"]).abs() ** power
    assert float(loss.detach()) == pytest.approx(float(errors[hidden].mean().detach()))
    (gradient,) = torch.autograd.grad(loss, decoded)
    assert not gradient[~hidden].any()
    assert gradient[hidden].all()


def test_patches_that_do_not_fit_are_refused() -> None:
    views = AugmentConfig(view1=ViewConfig(), view2=ViewConfig())
    with pytest.raises(ConfigError, match=r"--crop.size 32 does not divide .* 12"):
        InpaintingConfig(patch=12).views(CropConfig(size=32), views)


def test_generator_and_discriminator_learn_from_their_own_losses_alone() -> None:
    objective = _objective(hidden="centre", power=2, adversarial=0.1).double().eval()
    outputs = objective(_inputs(torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)))
    loss = objective.loss(outputs, 0)
    judge = objective.discriminator
    mine = dict(objective.named_parameters())
    gradients = dict(zip(mine, torch.autograd.grad(loss.value, list(mine.values()))))
    inside = slice(SIDE // 4, 3 * SIDE // 4)
    both = outputs.rows["images"], outputs.fixed["images"]
    made, real = (each[:, :, inside, inside] for each in both)

    own = [name for name in mine if name.startswith("discriminator.")]
    telling = softplus(judge(made.detach())).mean() + softplus(-judge(real)).mean()
    alone = torch.autograd.grad(telling, [mine[name] for name in own])
    for name, expected in zip(own, alone):
        torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12)

    # Again, for the graph of the first pass is gone.
    outputs = objective(_inputs(outputs.fixed["images"]))
    made = outputs.rows["images"][:, :, inside, inside]
    drawing = 0.9 * (made - real).square().mean() + 0.1 * softplus(-judge(made)).mean()
    others = [name for name in mine if name not in own]
    for name, expected in zip(others, torch.autograd.grad(drawing, [mine[n] for n in others])):
        torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12)


def test_a_discriminator_that_knows_nothing_pays_twice_ln_2() -> None:
    objective = _objective(hidden="centre", adversarial=0.5)
    with torch.no_grad():
        objective.discriminator.layers[-1].weight.zero_()
        objective.discriminator.layers[-1].bias.zero_()
    loss = objective.loss(objective(_inputs(torch.randn(3, 3, SIDE, SIDE))), 0)
    assert float(loss.metrics["discriminator_loss"]) == pytest.approx(2 * math.log(2))
    error = float(loss.metrics["hidden_error"])
    assert float(loss.value.detach()) == pytest.approx(0.5 * error + 2.5 * math.log(2))


def test_an_adversary_needs_a_square() -> None:
    with pytest.raises(ConfigError, match=r"set --objective\.hidden centre"):
        InpaintingConfig(adversarial=0.001)
