"""Colourisation: Lab as scikit-image has it, cells that colours fall in, and an encoder that sees
none."""

import copy
import dataclasses

import pytest
import torch

from common.errors import ConfigError
from trainer.models.encoders import EncoderConfig, build_encoder, see_colours
from trainer.objectives.base import Given, Inputs
from trainer.objectives.colourisation import Colourisation, ColourisationConfig
from trainer.objectives.parts.lab import HueCells, rgb_to_lab

SIDE = 32
GREY = EncoderConfig(name="resnet8", stem="cifar", sees="grey")


def _objective(**settings: object) -> Colourisation:
    config = ColourisationConfig(**settings)  # type: ignore[arg-type]
    return Colourisation(build_encoder(GREY), config, Given(side=SIDE))


def _inputs(images: torch.Tensor) -> Inputs:
    ids = torch.arange(len(images))
    return Inputs((images[None],), ids, torch.ones_like(ids, dtype=torch.bool))


def _normalised(images: torch.Tensor) -> torch.Tensor:
    given = Given()
    mean, std = (images.new_tensor(each)[:, None, None] for each in (given.mean, given.std))
    return (images - mean) / std


@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((255, 0, 0), (53.2406, 80.0923, 67.2028)),
        ((0, 255, 0), (87.7351, -86.1830, 83.1797)),
        ((0, 0, 255), (32.2957, 79.1856, -107.8573)),
        ((128, 128, 128), (53.585, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_lab_is_that_of_scikit_image(colour: tuple[int, ...], lab: tuple[float, ...]) -> None:
    """Its figures, by version 0.26: white is not quite grey in them."""
    image = torch.tensor(colour, dtype=torch.float64)[None, :, None, None] / 255
    assert rgb_to_lab(image).flatten().tolist() == pytest.approx(lab, abs=6e-3)
    # Cube roots and powers, of values up to 1, times 500.
    assert torch.allclose(rgb_to_lab(image.float()).double(), rgb_to_lab(image), atol=1e-3)


def test_every_colour_falls_in_a_cell_and_every_cell_has_one() -> None:
    cells = HueCells()
    assert len(cells) == 261
    levels = torch.arange(256) / 255
    hit = set()
    for red in levels.split(32):
        colours = torch.cartesian_prod(red, levels, levels).T[None, :, :, None]
        hues = rgb_to_lab(colours)[:, 1:]
        found = cells.of(hues)
        hit |= set(found.unique().tolist())
        distance = (cells.centres_Q2[found[0, :, 0]] - hues[0, :, :, 0].T).abs()
        assert float(distance.max()) <= 5.001
    assert hit == set(range(261))
    assert torch.equal(cells.of(cells.centres_Q2.T[None, :, :, None])[0, :, 0], torch.arange(261))


def test_an_encoder_that_sees_grey_cannot_tell_colours_of_one_grey() -> None:
    encoder = build_encoder(GREY).double().eval()
    images = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64)
    hues = torch.randn(4, 1, SIDE, SIDE, dtype=torch.float64)
    moved = images + hues * torch.tensor([0.587, -0.299, 0.0], dtype=torch.float64)[:, None, None]
    features = encoder(images)
    assert torch.allclose(encoder(moved), features, atol=1e-10)
    colours = build_encoder(dataclasses.replace(GREY, sees="colours")).double().eval()
    assert not torch.allclose(colours(moved), colours(images), atol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        GREY,
        EncoderConfig(name="resnet18", sees="grey"),
        EncoderConfig(name="convnext_tiny", sees="grey"),
        EncoderConfig(name="vit_b_32", sees="grey", image_size=32),
    ],
    ids=lambda config: config.name,
)
def test_it_becomes_one_of_coloured_images_and_is_the_same_function(config: EncoderConfig) -> None:
    encoder = build_encoder(config).double().eval()
    images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    features = encoder(images)
    other = copy.deepcopy(encoder)
    see_colours(other)
    plain = build_encoder(dataclasses.replace(config, sees="colours")).double().eval()
    plain.load_state_dict(other.state_dict())
    for each in (other, plain):
        assert torch.allclose(each(images), features, atol=1e-10)


def test_rare_cells_have_more_weight_and_the_mean_is_one() -> None:
    objective = _objective(uniform=0.5)
    assert torch.equal(objective.weights(), torch.ones(261))
    outputs = objective(_inputs(_normalised(torch.rand(6, 3, SIDE, SIDE))))
    objective.after_step(outputs, 0, 10, torch.zeros(()))
    counts, weights = objective.weights.counts, objective.weights()
    assert int(counts.sum()) == 6 * (SIDE // 4) ** 2
    assert float(weights[counts.argmax()]) < float(weights[counts == 0].max())
    # Zhang et al.: 1 / ((1 - l) p + l / Q), p smoothed by a Gaussian of 5, over its mean.
    centres = HueCells().centres_Q2.double()
    near = (-((centres[:, None] - centres) ** 2).sum(2) / 50).exp()
    shares = (near / near.sum(0)) @ (counts / counts.sum()).double()
    expected = 1 / (0.5 * shares + 0.5 / 261)
    expected /= (shares * expected).sum()
    assert torch.allclose(weights.double(), expected, rtol=1e-4)
    before = counts.clone()
    objective.after_step(outputs, 1, 10, torch.ones(()))
    assert torch.equal(objective.weights.counts, before)


@pytest.mark.parametrize("decodes", ["cells", "hues"])
def test_grey_images_teach_nothing(decodes: str) -> None:
    objective = _objective(decodes=decodes)
    images = torch.rand(5, 3, SIDE, SIDE)
    images[1] = images[1, :1]
    outputs = objective(_inputs(_normalised(images)))
    decoded = outputs.rows["hues"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        objective.loss(outputs._replace(rows={"hues": decoded}), 0).value, decoded
    )
    assert [bool(each.any()) for each in gradient] == [True, False, True, True, True]
    objective.after_step(outputs, 0, 10, torch.zeros(()))
    assert int(objective.weights.counts.sum()) in (0, 4 * (SIDE // 4) ** 2)
    nothing = objective(_inputs(_normalised(images[1:2])))
    assert float(objective.loss(nothing, 0).value.detach()) == 0


def test_right_answers_cost_nothing() -> None:
    images = _normalised(torch.rand(3, 3, SIDE, SIDE))
    hues = _objective(decodes="hues")
    outputs = hues(_inputs(images))
    right = {"hues": outputs.fixed["hues"] / 110}
    assert float(hues.loss(outputs._replace(rows=right), 0).value) < 1e-12
    cells = _objective()
    outputs = cells(_inputs(images))
    chosen = torch.nn.functional.one_hot(cells.cells.of(outputs.fixed["hues"]), 261)
    right = {"hues": 100.0 * chosen.permute(0, 3, 1, 2)}
    loss = cells.loss(outputs._replace(rows=right), 0)
    assert float(loss.value) < 1e-6
    assert float(loss.metrics["colourisation_top1"]) == 1


def test_an_encoder_that_sees_colours_is_refused() -> None:
    encoder = build_encoder(dataclasses.replace(GREY, sees="colours"))
    with pytest.raises(ConfigError, match=r"--encoder\.sees grey"):
        ColourisationConfig().build(encoder, None, Given(side=SIDE))  # type: ignore[arg-type]
