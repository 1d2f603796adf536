"""What a report looks at: views as training saw them, neighbours, a map, similarities."""

import numpy as np
import pytest
import torch

from data_pipeline.augment import Augment, AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from tests.report.made_runs import SMALL, finished_run
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer.config import from_json, to_json
from trainer.evaluation.load_encoder import load_encoder
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.rotation import RotationConfig
from trainer.report.pictures import make_pictures, project
from trainer.report.samples import first_views, read_spread, view_pairs
from trainer.state.run_data import read_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data"), count=72, side=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return finished_run(tmp_path_factory.mktemp("runs") / "run", data)


def test_views_are_those_that_the_runs_first_step_saw(run, data):
    settings = read_settings(run)
    shown = first_views(OpenData(data), settings, rows=5).views_RVSS3
    crop = CropConfig(size=32, scale=(0.2, 1.0))
    loader = TrainLoader(
        OpenData(data),
        views_of_one_size(crop),
        LoaderConfig(backend="torchvision", workers=1),
        seed=5,
        batch_size=24,
    )
    batch = next(loader.starting_at(Position(0, 0)))
    loader.close()
    config = from_json(AugmentConfig, settings["augment"])
    views = Augment(config, 5)(batch.crops_BVHWC, batch.ids_B, 0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    for row in range(5):
        for view in range(2):
            seen = views[view * 24 + row] * std + mean
            difference = seen.permute(1, 2, 0).numpy() * 255 - shown[row, view]
            assert np.abs(difference).max() < 0.51


def test_an_image_stands_beside_its_own_views(run, data):
    """With crops of everything and nothing changed, views are the image."""
    settings = read_settings(run)
    still = ViewConfig(flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    settings["augment"] = to_json(AugmentConfig(view1=still, view2=still))
    settings["crop"] = to_json(CropConfig(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    found = first_views(OpenData(data), settings, rows=6)
    assert found.originals_RSS3.std() > 10
    for view in range(2):
        assert np.array_equal(found.views_RVSS3[:, view], found.originals_RSS3)


def test_all_views_of_a_run_are_shown_whatever_their_number_and_size(run, data):
    """Small ones enlarged, each pixel to a square; and one view alone where a run takes one."""
    settings = read_settings(run)
    settings["objective"] = to_json(
        DeepClusterV2Config(small_views=3, small_crop=CropConfig(size=16, scale=(0.1, 0.3)))
    )
    views = first_views(OpenData(data), settings, rows=4).views_RVSS3
    assert views.shape == (4, 5, 32, 32, 3)
    small = views[:, 2:]
    assert np.array_equal(small, small[:, :, ::2, ::2].repeat(2, 2).repeat(2, 3))
    assert not np.array_equal(views[:, 0], views[:, 0, ::2, ::2].repeat(2, 1).repeat(2, 2))
    settings["objective"] = to_json(RotationConfig())
    alone = first_views(OpenData(data), settings, rows=4).views_RVSS3
    assert np.array_equal(alone, views[:, :1])


def test_images_are_spread_over_a_file_that_is_sorted_by_class(data):
    encoder = load_encoder("pixels:32").preprocessing
    batch = read_spread(OpenData(data), 9, encoder)
    assert batch.ids_N[0] == 0
    assert batch.ids_N[-1] == 71
    assert np.bincount(batch.labels_N).tolist() == [3, 3, 3]
    assert len(read_spread(OpenData(data), 1000, encoder).ids_N) == 72


def test_a_map_keeps_groups_together():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 20)) * 5
    labels = np.arange(90) % 3
    features = torch.tensor(centres[labels] + rng.normal(size=(90, 20)) * 0.1)
    points = project(features)
    assert points.shape == (90, 2)
    middles = np.stack([points[labels == n].mean(0) for n in range(3)])
    closest = ((points[:, None] - middles) ** 2).sum(-1).argmin(1)
    assert (closest == labels).mean() > 0.95
    assert np.array_equal(points, project(features))


def test_all_is_looked_at_where_all_is_there(run):
    found = make_pictures(run, read_settings(run), **SMALL)
    assert found.missing == ()
    assert found.views.views_RVSS3.shape == (8, 2, 32, 32, 3)
    assert found.queries.labelled
    assert found.queries.asked.labels_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [answer.images_RKSS3.shape for answer in found.queries.answers] == [
        (8, 6, 32, 32, 3)
    ] * 2
    assert found.map.samples.images_NSS3.shape == (60, 32, 32, 3)
    assert [points.shape for points in found.map.points.values()] == [(60, 2)] * 2
    assert found.similarities["positives"].shape == (72,)
    assert found.similarities["negatives"].shape == (72 * 71,)


def test_without_held_out_images_training_images_ask_but_not_for_themselves(tmp_path, data):
    run = tmp_path / "run"
    save_run(run, data)
    found = make_pictures(run, read_settings(run), **SMALL)
    assert found.missing == ()
    for answer in found.queries.answers:
        assert answer.images_RKSS3.shape[1] == 6
        for query, others in zip(found.queries.asked.images_NSS3, answer.images_RKSS3):
            assert not any(np.array_equal(query, image) for image in others)


def test_what_is_missing_is_left_out_and_said(tmp_path, data):
    run = tmp_path / "run"
    save_run(run, data)
    settings = read_settings(run)
    settings["data"]["test"] = str(tmp_path / "gone.beton")
    found = make_pictures(run, settings, **SMALL)
    assert found.views is not None
    assert found.map is found.queries is found.similarities is None
    assert found.missing == (
        ("neighbours, map and similarities", f"{tmp_path / 'gone.beton'} is not there any more"),
    )


def test_similarities_are_of_the_views_that_the_encoder_was_trained_on(run, data):
    """By hand: two views of each image, through the encoder, cosine by cosine."""
    settings = read_settings(run)
    views = view_pairs(OpenData(data), settings, 72)
    assert views.shape == (2, 72, 3, 32, 32)
    encoder = load_encoder(str(run)).encoder
    with torch.no_grad():
        first, second = (torch.nn.functional.normalize(encoder(v), dim=1) for v in views)
    found = make_pictures(run, settings, **SMALL).similarities
    assert found["positives"] == pytest.approx((first * second).sum(dim=1).numpy(), abs=1e-4)
    others = (first @ second.T).numpy()[~np.eye(72, dtype=bool)]
    assert np.sort(found["negatives"]) == pytest.approx(np.sort(others), abs=1e-4)
