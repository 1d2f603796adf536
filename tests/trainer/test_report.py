"""The figures of a run: what they show is what is there, and what is missing is said."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.augment import Augment, AugmentConfig, ViewConfig
from data_pipeline.loader import LoaderConfig, train_loader
from data_pipeline.order import Position
from data_pipeline.views import CropConfig
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer import figures, report
from trainer.config import to_json
from trainer.encoders import EncoderConfig
from trainer.errors import ConfigError
from trainer.figures import Bar
from trainer.report import ReportConfig, write_figures

NAMES = ["curves", "accuracy", "views", "neighbours", "map", "overview"]
SMALL = ReportConfig(max_images=60, view_rows=6, queries=4, neighbours=3, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data"), count=72, side=32)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, data):
    """A run's folder with all that a report can show."""
    run = tmp_path_factory.mktemp("runs") / "run"
    encoder = EncoderConfig(name="resnet18", stem="imagenet")
    save_run(run, data, encoder, test=data)
    write_metrics(run, 30)
    for name, kind, top1 in (("a", "run", 0.8), ("b", "pixels", 0.3), ("c", "untrained", 0.2)):
        write_evaluation(run, name, kind, top1)
    return run


def write_metrics(run, steps):
    records = [
        {"step": n, "epoch": n // 10, "loss": 5 - n / 10, "lr": 0.1, "images_per_second": 90.0}
        for n in range(1, steps + 1)
    ]
    records[-1]["knn_top1"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(run, name, kind, top1, protocol="weighted-knn", few=10):
    (run / "evaluation").mkdir(exist_ok=True)
    values = {
        "top1": top1,
        "top5": 1.0,
        "n_train": 30,
        "num_classes": 3,
        "protocol": protocol,
        "settings": {"labels_per_class": few} if few else {},
        "encoder": {"kind": kind},
    }
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(values))


def test_a_finished_run_gets_every_figure(finished_run, tmp_path):
    written = write_figures(finished_run, tmp_path / "figures", SMALL)
    assert [path.stem for path in written] == NAMES
    for path in written:
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 200
        assert image.std() > 10, f"{path} is blank"
        assert path.stat().st_size < 200_000
        # Nothing is cut off: the outermost pixels are the page.
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert rim.min() > 200, f"something reaches the rim of {path}"
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        f"{name}.png" for name in NAMES
    )


def test_the_same_run_gives_the_same_bytes(finished_run, tmp_path):
    first, second = (
        [path.read_bytes() for path in write_figures(finished_run, tmp_path / name, SMALL)]
        for name in ("first", "second")
    )
    assert first == second


def test_what_is_missing_is_left_out_and_said(tmp_path, data, caplog):
    run = tmp_path / "run"
    save_run(run, data)  # no test data, no metrics, no evaluations
    with caplog.at_level(logging.INFO, logger="trainer.report"):
        written = write_figures(run, tmp_path / "out", SMALL)
    assert [path.stem for path in written] == ["views", "overview"]
    for text in ("curves", "metrics.jsonl", "accuracy", "widebatch evaluate", "no --data.test"):
        assert text in caplog.text


def test_a_run_that_has_just_begun_gets_what_there_is(finished_run, tmp_path, caplog):
    """No checkpoint yet, no data any more: curves all the same."""
    run = tmp_path / "run"
    run.mkdir()
    settings = json.loads((finished_run / "config.json").read_text())
    settings["data"] = {"train": str(tmp_path / "gone.beton"), "test": None}
    (run / "config.json").write_text(json.dumps(settings))
    write_metrics(run, 2)
    with caplog.at_level(logging.INFO, logger="trainer.report"):
        written = write_figures(run, tmp_path / "out", SMALL)
    assert [path.stem for path in written] == ["curves", "overview"]
    assert "gone.beton is not there any more" in caplog.text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        write_figures(tmp_path, tmp_path / "out")


def test_without_matplotlib_the_remedy_is_named(finished_run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        write_figures(finished_run, tmp_path / "out", SMALL)


def test_a_failure_while_drawing_keeps_the_previous_figure(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"previous")
    with figures.new_figure(1, 1) as figure:

        def fail(*args, **kwargs):
            raise OSError("disk full")

        figure.savefig = fail
        with pytest.raises(OSError, match="disk full"):
            figures.save_png(figure, path)
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_of_a_killed_run_lose_only_the_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    metrics = report.read_metrics(tmp_path)
    assert metrics["step"].tolist() == [1.0]
    assert metrics["loss"].tolist() == [2.5]


def test_metrics_that_some_steps_lack_are_not_a_number_there(tmp_path):
    lines = ['{"step": 1, "loss": 2}', '{"step": 2, "loss": null, "knn_top1": 0.5, "note": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    metrics = report.read_metrics(tmp_path)
    assert np.array_equal(metrics["loss"], [2.0, np.nan], equal_nan=True)
    assert np.array_equal(metrics["knn_top1"], [np.nan, 0.5], equal_nan=True)
    assert "note" not in metrics


def test_the_running_mean_keeps_a_ramp_and_its_ends():
    ramp = np.arange(500.0)
    assert np.allclose(figures._running_mean(ramp), ramp)
    noise = np.random.default_rng(0).normal(size=5000)
    assert figures._running_mean(noise).std() < 0.2


def test_evaluations_stand_in_groups_pixels_first(tmp_path):
    write_evaluation(tmp_path, "a", "exported", 0.8)
    write_evaluation(tmp_path, "b", "untrained", 0.2)
    write_evaluation(tmp_path, "c", "pixels", 0.3, protocol="logistic", few=None)
    (tmp_path / "evaluation" / "d.json").write_text("[]")
    bars, chance = report.read_evaluations(tmp_path)
    assert chance == pytest.approx(1 / 3)
    assert [(bar.group, bar.name, bar.value) for bar in bars] == [
        ("kNN\n10 labels\nper class", "pretrained encoder", 0.8),
        ("kNN\n10 labels\nper class", "untrained encoder", 0.2),
        ("linear (logistic)\n30\nlabels", "raw pixels", 0.3),
    ]
    assert sorted(bars, key=lambda bar: bar.rank)[0].name == "raw pixels"


def test_a_name_has_one_colour_and_one_place_in_every_group():
    bars = [Bar("g", "b", 0.5, 1), Bar("h", "a", 0.2, 0), Bar("h", "b", 0.7, 1)]
    figure = figures.accuracy_bars(bars, 0.1)
    axes = figure.axes[0]
    (a,), b = (container.patches for container in axes.containers)
    assert [container.get_label() for container in axes.containers] == ["a", "b"]
    assert a.get_facecolor() != b[0].get_facecolor() == b[1].get_facecolor()
    assert a.get_x() < b[1].get_x()
    assert b[1].get_height() == pytest.approx(70)


def test_views_are_those_that_the_runs_first_step_saw(finished_run, data):
    settings = report.read_settings(finished_run)
    _, shown = report.first_views(data, settings, rows=5)
    crop = CropConfig(size=32, scale=(0.2, 1.0))
    loader = train_loader(
        data, crop, LoaderConfig(backend="torchvision", workers=1), seed=5, batch_size=24
    )
    batch = next(loader.starting_at(Position(0, 0)))
    loader.close()
    config = report.from_json(AugmentConfig, settings["augment"])
    views = Augment(config, 5)(batch.crops_BVHWC, batch.ids_B, 0)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    for row in range(5):
        for view in range(2):
            seen = views[view * 24 + row] * std + mean
            difference = seen.permute(1, 2, 0).numpy() * 255 - shown[row, view]
            assert np.abs(difference).max() < 0.51


def test_an_image_stands_beside_its_own_views(finished_run, data):
    """With crops of everything and nothing changed, views are the image."""
    settings = report.read_settings(finished_run)
    still = ViewConfig(flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    settings["augment"] = to_json(AugmentConfig(view1=still, view2=still))
    settings["crop"] = to_json(CropConfig(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    originals, views = report.first_views(data, settings, rows=6)
    assert originals.std() > 10
    for view in range(2):
        assert np.array_equal(views[:, view], originals)


def test_nearest_are_those_of_highest_cosine():
    rng = np.random.default_rng(1)
    bank, asked = rng.normal(size=(40, 7)), rng.normal(size=(5, 7))
    found = report.nearest(torch.tensor(asked), torch.tensor(bank), 3).numpy()
    for row, query in enumerate(asked):
        cosine = [query @ b / np.linalg.norm(query) / np.linalg.norm(b) for b in bank]
        assert found[row].tolist() == np.argsort(cosine)[::-1][:3].tolist()


def test_queries_take_turns_among_the_classes():
    labels = torch.tensor([2, 2, 2, 0, 0, 1])
    assert labels[report._one_per_class(labels, 5)].tolist() == [0, 1, 2, 0, 2]


def test_images_are_spread_over_a_file_that_is_sorted_by_class(data):
    encoder = report.load_encoder("pixels:32").preprocessing
    batch = report.read_spread(data, 9, encoder)
    assert batch.ids_B[0] == 0
    assert batch.ids_B[-1] == 71
    assert torch.bincount(batch.labels_B).tolist() == [3, 3, 3]
    assert len(report.read_spread(data, 1000, encoder).ids_B) == 72


def test_crossed_neighbours_are_those_of_another_class():
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    agree = np.array([[True, False, True], [False, False, True]])
    with figures.new_figure(3, 2) as figure:
        axes = figure.add_subplot()
        end = figures.draw_neighbours(axes, figures.Neighbours("t", images, agree), left=10.0)
    centres = {
        (int((line.get_xdata()[0] - 10) // 9), int(line.get_ydata().min() // 9))
        for line in axes.lines
    }
    assert centres == {(1, 0), (0, 1), (1, 1)}
    assert end == 10 + 3 * 8 + 2


def test_a_map_keeps_groups_together():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 20)) * 5
    labels = np.arange(90) % 3
    features = torch.tensor(centres[labels] + rng.normal(size=(90, 20)) * 0.1)
    points = report.project(features)
    assert points.shape == (90, 2)
    middles = np.stack([points[labels == n].mean(0) for n in range(3)])
    nearest = ((points[:, None] - middles) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.95
    assert np.array_equal(points, report.project(features))


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"report\.queries must be 1 or more"):
        ReportConfig(queries=0)
    assert dataclasses.replace(SMALL, queries=2).queries == 2
