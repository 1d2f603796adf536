"""Jigsaw and relative patch location: tiles, orders of tiles, and what must not tell the answer."""

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from trainer.objectives.base import Given, Inputs
from trainer.objectives.jigsaw import Jigsaw, JigsawConfig
from trainer.objectives.parts.chromatic_aberration import drop_colours, project_colours
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.permutations import permutations_of_nine
from trainer.objectives.parts.tiles import TILES, check_tiles, cut_tiles, standardised
from trainer.objectives.relativepatch import RelativePatch, RelativePatchConfig

SEED, STEP = -3, 41


def _inputs(images_NCHW: torch.Tensor) -> Inputs:
    ids = torch.arange(len(images_NCHW)) * 7 + 2
    return Inputs((images_NCHW[None],), ids, torch.ones_like(ids, dtype=torch.bool), STEP)


class _Corner(nn.Module):
    """The features of a tile are its first pixel's three numbers."""

    feature_dim = 3

    def forward(self, tiles_RCHW: torch.Tensor) -> torch.Tensor:
        return tiles_RCHW[:, :, 0, 0]


@pytest.mark.parametrize("seed", [0, -3, 2**64 - 1])
def test_draws_on_the_device_are_those_of_the_host(seed: int) -> None:
    ids = np.array([0, 1, 5, 1_281_166, 2**62])
    keys = sample_keys(seed, STEP, ids[:, None], np.arange(18), Stream.TILE)
    drawn = uniform_draws(seed, STEP, torch.from_numpy(ids), Stream.TILE, 18)
    assert np.array_equal(drawn.numpy(), uniforms(keys))


def test_a_tile_is_the_pixels_of_its_place_in_its_cell() -> None:
    side, cell, tile = 30, 10, 7
    images = torch.arange(4 * 3 * side * side).reshape(4, 3, side, side)
    draws = uniform_draws(SEED, STEP, torch.arange(4), Stream.TILE, 2 * TILES)
    tiles = cut_tiles(images, tile, draws)
    corners = (draws * (cell - tile + 1)).long().reshape(4, 3, 3, 2)
    for image, row, column in np.ndindex(4, 3, 3):
        top, left = (int(n) for n in corners[image, row, column])
        assert 0 <= top <= cell - tile
        assert 0 <= left <= cell - tile
        y, x = row * cell + top, column * cell + left
        expected = images[image, :, y : y + tile, x : x + tile]
        assert torch.equal(tiles[image, 3 * row + column], expected)


def test_a_tile_takes_every_place_of_its_cell_alike_often() -> None:
    places, samples = 4, 4000
    draws = uniform_draws(SEED, STEP, torch.arange(samples), Stream.TILE, 2 * TILES)
    corners = (draws * places).long()
    for axis in range(2 * TILES):
        counts = torch.bincount(corners[:, axis], minlength=places)
        # Five deviations of a binomial count.
        assert (counts - samples / places).abs().max() < 5 * (samples * 0.25 * 0.75) ** 0.5


def test_a_standardised_tile_tells_no_brightness() -> None:
    tiles = torch.rand(2, TILES, 3, 5, 5, dtype=torch.float64)
    assert torch.allclose(standardised(tiles), standardised(3 * tiles + 5))
    assert not standardised(torch.full((1, 1, 3, 5, 5), 0.3)).any()


def test_sizes_that_do_not_go_together_are_refused_with_what_does() -> None:
    with pytest.raises(ConfigError, match=r"--crop.size 32 .* 30 and 33"):
        check_tiles(32, 8)
    with pytest.raises(ConfigError, match=r"--objective.tile 11 is more than the 10 pixels"):
        check_tiles(30, 11)


@pytest.mark.parametrize(("count", "distance"), [(9, 9), (100, 7), (504, 7), (505, 6), (1512, 6)])
def test_any_two_orders_differ_in_as_many_places_as_promised(count: int, distance: int) -> None:
    orders = permutations_of_nine()[:count]
    assert (np.sort(orders, 1) == np.arange(9)).all()
    differ = (orders[:, None] != orders).sum(2)
    assert differ[~np.eye(count, dtype=bool)].min() == distance


@pytest.mark.parametrize("count", [2, 100, 504, 1000, 1512])
def test_no_single_tile_tells_the_order(count: int) -> None:
    orders = permutations_of_nine()[:count]
    for place in range(9):
        counts = np.bincount(orders[:, place], minlength=9)
        assert counts.min() >= count // 9
        assert counts.max() <= -(-count // 9)


def test_features_in_order_are_those_of_shuffled_tiles() -> None:
    """The one is a pass for any number of orders, the other a pass for each."""
    torch.manual_seed(0)
    config = JigsawConfig(permutations=50, orders=3, tile=7, width=4)
    objective = Jigsaw(_Corner(), config, SEED).double()  # type: ignore[arg-type]
    images = torch.rand(5, 3, 30, 30, dtype=torch.float64)
    inputs = _inputs(images)
    outputs = objective(inputs)
    places = uniform_draws(SEED, STEP, inputs.ids_N, Stream.TILE, 2 * TILES)
    tiles = standardised(cut_tiles(images, 7, places))
    orders = outputs.fixed["orders"]
    assert orders.unique().numel() > 5
    for index in range(config.orders):
        shuffled = torch.stack(
            [tiles[n, objective.permutations[order]] for n, order in enumerate(orders[:, index])]
        )
        logits = objective.classifier(objective.tiles(objective.encoder, shuffled).flatten(1))
        assert torch.allclose(logits, outputs.rows["logits"][:, index], rtol=1e-12, atol=1e-12)


def test_a_neighbours_logits_stand_at_its_side() -> None:
    """A tile's brightness tells its place, and a classifier that reads it is right on all sides."""
    objective = RelativePatch(
        _Corner(),  # type: ignore[arg-type]
        RelativePatchConfig(tile=10, width=1),
        Given(SEED),
    )
    images = torch.zeros(2, 3, 30, 30)
    for row, column in np.ndindex(3, 3):
        images[:, :, 10 * row : 10 * row + 10, 10 * column : 10 * column + 10] = 3 * row + column
    objective.tiles.forward = lambda encoder, tiles: tiles[:, :, 0, 0, :1]  # type: ignore
    objective.classifier = nn.Identity()  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.objectives.relativepatch.standardised", lambda tiles: tiles)
        seen = objective(_inputs(images)).rows["logits"]
    assert (seen[..., 0] == 4).all()
    assert torch.equal(seen[0, :, 1], torch.tensor([0.0, 1, 2, 3, 5, 6, 7, 8]))


def test_projected_colours_have_no_green_against_magenta() -> None:
    std = (0.2, 0.3, 0.25)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    projected = project_colours(images, std)
    scale = torch.tensor(std, dtype=torch.float64)[:, None, None]
    red, green, blue = (projected * scale).unbind(1)
    assert torch.allclose(2 * green, red + blue)
    assert torch.allclose(project_colours(projected, std), projected)
    grey = torch.full((1, 3, 2, 2), 0.7, dtype=torch.float64) / scale
    assert torch.allclose(project_colours(grey, std), grey)


def test_dropped_colours_leave_one_of_each_tile() -> None:
    tiles = torch.rand(300, TILES, 3, 2, 2) + 0.1
    kept = drop_colours(
        tiles, uniform_draws(SEED, STEP, torch.arange(300), Stream.TILE_COLOUR, TILES)
    )
    is_there = kept.abs().sum((3, 4)) > 0
    assert (is_there.sum(2) == 1).all()
    counts = is_there.sum((0, 1)).double()
    assert (counts - 900).abs().max() < 5 * (2700 * 2 / 9) ** 0.5
    assert torch.equal(kept[is_there], tiles[is_there])
