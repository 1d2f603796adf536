"""GAN features: two networks that learn from their own losses in one step."""

import math
from typing import Literal

import pytest
import torch
from torch.nn.functional import softplus

from common.errors import ConfigError
from tests.trainer.runs import inputs_of
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.base import Given
from trainer.objectives.gan import GAN, GANConfig

SIDE = 32
LAYER_NORM = EncoderConfig(name="resnet8", stem="cifar", norm="layer")


def _objective(learns: Literal["discriminator", "inverse"] = "discriminator") -> GAN:
    torch.manual_seed(0)
    encoder = build_encoder(LAYER_NORM)
    config = GANConfig(code=8, learns=learns)
    return config.build(encoder, None, Given(side=SIDE)).double()  # type: ignore[arg-type]


def test_each_network_has_the_gradient_of_its_own_loss() -> None:
    objective = _objective()
    inputs = inputs_of(torch.randn(1, 5, 3, SIDE, SIDE, dtype=torch.float64))
    mine = dict(objective.named_parameters())
    value = objective.loss(objective(inputs), 0).value
    gradients = dict(zip(mine, torch.autograd.grad(value, list(mine.values()))))
    made = objective._made(objective._code(inputs))
    judges = [name for name in mine if name.startswith(("encoder.", "verdict."))]
    losses = {
        True: softplus(objective._judge(made.detach())).mean()
        + softplus(-objective._judge(inputs.views[0][0])).mean(),
        False: softplus(-objective._judge(made)).mean(),
    }
    for is_judge, loss in losses.items():
        names = [name for name in mine if (name in judges) == is_judge]
        expected = torch.autograd.grad(loss, [mine[name] for name in names])
        for name, other in zip(names, expected):
            torch.testing.assert_close(gradients[name], other, rtol=1e-8, atol=1e-12)
            assert other.any(), name


def test_an_inverse_has_the_gradient_of_its_own_loss_too() -> None:
    objective = _objective("inverse")
    inputs = inputs_of(torch.randn(1, 5, 3, SIDE, SIDE, dtype=torch.float64))
    mine = dict(objective.named_parameters())
    value = objective.loss(objective(inputs), 0).value
    gradients = dict(zip(mine, torch.autograd.grad(value, list(mine.values()))))
    judge, images, code = objective.discriminator, inputs.views[0][0], objective._code(inputs)
    made, told = objective._made(code), objective.to_code(objective.encoder(images))
    losses = {
        ("discriminator.",): softplus(judge(made.detach(), code)).mean()
        + softplus(-judge(images, told.detach())).mean(),
        ("encoder.", "to_code."): softplus(judge(images, told)).mean(),
        ("decoder.", "from_code."): softplus(-judge(made, code)).mean(),
    }
    found = 0
    for parts, loss in losses.items():
        names = [name for name in mine if name.startswith(parts)]
        expected = torch.autograd.grad(loss, [mine[name] for name in names])
        for name, other in zip(names, expected):
            torch.testing.assert_close(gradients[name], other, rtol=1e-8, atol=1e-12)
            assert other.any(), name
        found += len(names)
    assert found == len(mine)


def test_made_images_change_with_step_and_sample_and_with_nothing_else() -> None:
    objective = _objective().eval()
    images = torch.randn(1, 4, 3, SIDE, SIDE, dtype=torch.float64)
    made, again, later = (
        objective._made(objective._code(inputs))
        for inputs in (inputs_of(images), inputs_of(2 * images), inputs_of(images, step=1))
    )
    assert torch.equal(again, made)
    assert not torch.equal(later, made)
    assert not torch.equal(made[0], made[1])


def test_a_discriminator_that_knows_nothing_pays_thrice_ln_2() -> None:
    objective = _objective()
    with torch.no_grad():
        objective.verdict.weight.zero_()
        objective.verdict.bias.zero_()
    loss = objective.loss(
        objective(inputs_of(torch.randn(1, 3, 3, SIDE, SIDE, dtype=torch.float64))), 0
    )
    assert float(loss.value.detach()) == pytest.approx(3 * math.log(2))
    assert float(loss.metrics["discriminator_loss"]) == pytest.approx(2 * math.log(2))


def test_a_discriminator_of_pairs_that_knows_nothing_pays_four_times_ln_2() -> None:
    objective = _objective("inverse")
    with torch.no_grad():
        objective.discriminator.together[2].weight.zero_()
        objective.discriminator.together[2].bias.zero_()
    images = torch.randn(1, 3, 3, SIDE, SIDE, dtype=torch.float64)
    loss = objective.loss(objective(inputs_of(images)), 0)
    assert float(loss.value.detach()) == pytest.approx(4 * math.log(2))
    shown = objective.eval().pictures(inputs_of(images))
    assert shown["made of its code"].shape == shown["image"].shape


def test_an_inverse_may_have_batch_norm() -> None:
    """It judges nothing: whom an image is with tells it no more than elsewhere."""
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    GANConfig(learns="inverse").build(encoder, None, Given(side=SIDE))  # type: ignore[arg-type]


def test_a_sure_discriminator_does_not_overflow_the_generators_gradient() -> None:
    objective = _objective().float()
    with torch.no_grad():
        objective.verdict.bias.fill_(-200.0)
    value = objective.loss(objective(inputs_of(torch.randn(1, 3, 3, SIDE, SIDE))), 0).value
    gradients = torch.autograd.grad(value, list(objective.decoder.parameters()))
    assert all(bool(each.isfinite().all()) for each in gradients)


def test_an_encoder_with_batch_norm_is_refused() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    with pytest.raises(ConfigError, match=r"set --encoder\.norm layer"):
        GANConfig().build(encoder, None, Given(side=SIDE))  # type: ignore[arg-type]
