"""Pictures of a run's own task: what it saw, and what it says."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from data_pipeline.crops import CropConfig
from data_pipeline.reading.open_data import OpenData
from tests.trainer.runs import checkpoint_bytes, inputs_of, pack_images, train
from tests.trainer.saved_runs import save_run
from tests.trainer.tiny import (
    tiny_autoencoder_config,
    tiny_bigan_config,
    tiny_colourisation_config,
    tiny_deepcluster_config,
    tiny_deepclusterv2_config,
    tiny_frameorder_config,
    tiny_gan_config,
    tiny_inpainting_config,
    tiny_jigsaw_config,
    tiny_joint_config,
    tiny_mae_config,
    tiny_relativepatch_config,
    tiny_rotation_config,
    tiny_vae_config,
)
from trainer.evaluation.load_encoder import Preprocessing
from trainer.evaluation.pictures import Album
from trainer.objectives.base import Outputs
from trainer.objectives.parts.lab import lab_to_rgb, rgb_to_lab
from trainer.objectives.parts.tiles import TILES, cut_tiles, joined
from trainer.parallel.networks import build_objective
from trainer.report.contents import read_contents
from trainer.report.page import page
from trainer.report.pictures import Pictures, make_pictures
from trainer.report.png import write_figures
from trainer.report.task import task_pictures
from trainer.state.run_data import read_settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data"), count=40, side=32)


@pytest.mark.parametrize("tiny", [tiny_deepcluster_config, tiny_deepclusterv2_config])
def test_a_run_of_clusters_shows_what_lies_together(data, tmp_path, tiny):
    config = tiny(data, tmp_path / "run", steps=1)
    assert train(1, config) == "done"
    settings, train_data = read_settings(config.out), OpenData(config.data.train)
    found = task_pictures(config.out, settings, train_data, CPU)
    tensors = safetensors.torch.load(checkpoint_bytes(config.out)["model.safetensors"])
    clusters = tensors["clusters"].view(-1, 40)[0]
    sizes = [int(row.split(": ")[1].split()[0]) for row in found.rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == int(
        clusters[clusters >= 0].bincount().max()
    )
    images = {image.tobytes(): sample for sample, image in enumerate(_all_images(train_data))}
    for row, shown in zip(found.rows, found.images_NKSS3, strict=True):
        cluster = int(row.split(":")[0].split()[1])
        samples = [images[image.tobytes()] for image in shown]
        assert len(set(samples)) == len(samples)
        assert {int(clusters[sample]) for sample in samples} == {cluster}, row
    (contents,) = read_contents([config.out], Pictures(task=found))
    assert found.rows[0] in page([contents])
    assert [path.stem for path in write_figures(contents, tmp_path / "figures")].count("task") == 1


def _all_images(data):
    return Album(data, Preprocessing(size=32, resize=32)).read(range(data.info.num_samples))


@pytest.mark.parametrize(
    ("tiny", "titles"),
    [
        (tiny_rotation_config, ("turned", "turned back")),
        (tiny_jigsaw_config, ("shuffled", "put back")),
        (tiny_relativepatch_config, ("tiles", "put where they are said to lie")),
        (tiny_frameorder_config, ("said to be first", "second", "third", "last")),
        (tiny_autoencoder_config, ("given", "decoded", "image")),
        (tiny_vae_config, ("decoded", "image")),
        (tiny_inpainting_config, ("seen", "filled in", "image")),
        (tiny_mae_config, ("seen", "filled in", "image")),
        (tiny_gan_config, ("made", "image")),
        (tiny_bigan_config, ("made of its code", "image")),
        (tiny_joint_config, ("turned", "turned back")),
        (tiny_colourisation_config, ("grey", "coloured", "image")),
    ],
)
def test_a_run_shows_what_its_task_makes_of_its_images(data, tmp_path, tiny, titles):
    config = tiny(data, tmp_path / "run", steps=1)
    assert train(1, config) == "done"
    settings = read_settings(config.out)
    train_data = OpenData(config.data.train)
    found = task_pictures(config.out, settings, train_data, CPU)
    assert found.titles == titles
    assert found.images_NKSS3.shape[:2] == (16, len(titles))
    assert found.images_NKSS3.dtype == np.uint8
    for image in found.images_NKSS3[:, -1]:
        assert image.std() > 4
    again = task_pictures(config.out, settings, train_data, CPU)
    assert np.array_equal(again.images_NKSS3, found.images_NKSS3)
    (contents,) = read_contents([config.out], Pictures(task=found))
    text = page([contents])
    assert "What the task makes of images" in text
    assert f"image 3, {titles[0]}" in text
    assert "task" in [path.stem for path in write_figures(contents, tmp_path / "out")]


def test_a_task_without_pictures_has_no_part_in_the_page(data, tmp_path):
    save_run(tmp_path / "run", data)
    made = make_pictures(tmp_path / "run", read_settings(tmp_path / "run"), max_images=40)
    assert made.task is None
    assert "task" not in " ".join(part for part, _ in made.missing)


def _told(objective, right):
    """The objective, whose logits name ``right``, a place for each row."""
    whole = objective.forward

    def forward(inputs):
        outputs = whole(inputs)
        logits = torch.zeros_like(outputs.rows["logits"])
        return Outputs(
            {"logits": logits.scatter(-1, right(outputs)[..., None], 1.0)}, outputs.fixed
        )

    objective.forward = forward
    return objective.eval()


def test_right_turns_bring_the_image_back_and_wrong_ones_do_not(data, tmp_path):
    objective = build_objective(tiny_rotation_config(data, tmp_path))
    images = torch.rand(6, 3, 32, 32)
    turns = torch.arange(4).expand(6, 4)
    shown = _told(objective, lambda _: turns).pictures(inputs_of(images[None]))
    assert torch.equal(shown["turned back"], images)
    assert torch.equal(shown["turned"][1], images[1].rot90(1, (1, 2)))
    shown = _told(objective, lambda _: (turns + 1) % 4).pictures(inputs_of(images[None]))
    assert torch.equal(shown["turned back"][2], images[2].rot90(-1, (1, 2)))


def test_the_right_order_puts_tiles_back_in_their_places(data, tmp_path):
    config = tiny_jigsaw_config(data, tmp_path, crop=CropConfig(size=30))
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, tile=10)
    )  # tiles that fill their cells
    objective = build_objective(config)
    images = torch.rand(6, 3, 30, 30)
    shown = _told(objective, lambda outputs: outputs.fixed["orders"]).pictures(
        inputs_of(images[None])
    )
    assert torch.equal(shown["put back"], images)
    assert not torch.equal(shown["shuffled"], images)
    tiles = cut_tiles(images, 10, torch.zeros(6, 2 * TILES, dtype=torch.float64))
    assert torch.equal(joined(tiles), images)


def test_neighbours_lie_where_they_are_said_to_lie(data, tmp_path):
    config = tiny_relativepatch_config(data, tmp_path, crop=CropConfig(size=30))
    objective = build_objective(config)
    images = torch.rand(6, 3, 30, 30)
    sides = torch.arange(8).expand(6, 8)
    shown = _told(objective, lambda _: sides).pictures(inputs_of(images[None]))
    tiles, put = shown.values()
    assert torch.equal(put, tiles)
    # All on the last side: the last neighbour stands there, beside the centre.
    _, put = (
        _told(objective, lambda _: torch.full_like(sides, 7))
        .pictures(inputs_of(images[None]))
        .values()
    )
    side = tiles.shape[-1] // 3
    kept = torch.zeros_like(tiles)
    for place in (slice(side, 2 * side), slice(2 * side, None)):
        kept[..., place, place] = tiles[..., place, place]
    assert torch.equal(put, kept)


def test_lab_and_back_is_the_colour():
    colours = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    colours[0] *= 0.03
    # The white point and the matrix have six digits.
    assert torch.allclose(lab_to_rgb(rgb_to_lab(colours)), colours, atol=1e-4)
