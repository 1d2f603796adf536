"""Several labels of an image, or numbers, by all three ways: against plain computations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from common.errors import ConfigError, DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.pool import LoaderConfig
from tests.dist import run_ranks
from tests.trainer.runs import SMALL_ENCODER
from tests.trainer.saved_runs import save_run
from trainer.evaluation.targets import TargetsConfig, targets
from trainer.features.targets import linear, neighbours, precision_of

COUNT, SIDE = 80, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour and noise; what is asked for is how red and how bright they are."""
    folder = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    rows = {"labels": ["file,red,bright,never"], "numbers": ["file,red,brightness"]}
    for index in range(COUNT):
        colour = rng.uniform(40, 215, 3)
        noise = rng.normal(0, 10, (SIDE, SIDE, 3))
        path = folder / "images" / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(path)
        red, bright = colour[0] > colour[1:].max(), colour.mean() > 127
        known = ["" if index % 9 == 0 else f"{int(red)}", f"{int(bright)}", "0"]
        rows["labels"].append(",".join([path.name, *known]))
        rows["numbers"].append(f"{path.name},{colour[0]:.3f},{colour.mean():.3f}")
    for name, lines in rows.items():
        table = folder / f"{name}.csv"
        table.write_text("\n".join(lines))
        config = PackConfig(targets=table, workers=1)
        pack(str(folder / "images"), folder / f"{name}.beton", config, progress=False)
    pack(str(folder / "images"), folder / "none.beton", PackConfig(workers=1), progress=False)
    save_run(folder / "run", folder / "labels.beton", SMALL_ENCODER)
    return folder


def _config(folder: Path, name: str, **changes: Any) -> TargetsConfig:
    data = (folder / f"{name}.beton",)
    given = TargetsConfig(
        source="pixels:4",
        train=data,
        test=data,
        loader=LoaderConfig(backend="torchvision", workers=1),
        device="cpu",
        precision="fp64",
        epochs=25,
        tuning_batch=20,
        base_lr=0.5,
    )
    return dataclasses.replace(given, **changes)


def _found(config: TargetsConfig) -> dict[str, Any]:
    report = targets(config)
    assert report is not None
    json.dumps(report, allow_nan=False)
    return report


@pytest.mark.parametrize("by", ["linear", "knn", "finetune"])
def test_labels_that_images_show_are_told(folder: Path, by: Any) -> None:
    source = "pixels:4" if by != "finetune" else str(folder / "run")
    report = _found(_config(folder, "labels", by=by, source=source))
    assert (report["method"], report["protocol"], report["kind"]) == ("targets", by, "labels")
    assert list(report["by_target"]) == ["red", "bright"]
    assert report["notes"] == ["left out, not two values among the training images: never"]
    each = report["by_target"]
    mean = np.mean([target["average_precision"] for target in each.values()])
    assert report["mean_average_precision"] == pytest.approx(mean)
    for target in each.values():  # the share of images is what chance reaches
        assert target["average_precision"] > 0.9 > target["share"] + 0.2


@pytest.mark.parametrize(("by", "least"), [("linear", 0.95), ("knn", 0.6), ("finetune", 0.6)])
def test_numbers_that_images_show_are_told(folder: Path, by: Any, least: float) -> None:
    source = "pixels:4" if by != "finetune" else str(folder / "run")
    report = _found(_config(folder, "numbers", by=by, source=source, k=5, base_lr=0.1))
    assert report["kind"] == "numbers"
    assert least < report["r2"] <= 1
    assert report["mean_absolute_error"] < 30  # of numbers whose mean deviation is about 40


def _scores(rank: int, world_size: int, config: TargetsConfig) -> Any:
    report = targets(config)
    return None if report is None else (report["by_target"]["red"]["r2"], report["r2"])


@pytest.mark.parametrize("by", ["linear", "finetune"])
def test_two_processes_find_what_one_does(folder: Path, by: Any) -> None:
    source = str(folder / "run")
    config = _config(folder, "numbers", by=by, source=source, epochs=3)
    (one,) = run_ranks(_scores, 1, config, timeout=120, init_process_group=False)
    two = run_ranks(_scores, 2, config, timeout=120, init_process_group=False)
    assert two[1] is None
    assert two[0] == pytest.approx(one, rel=1e-6)


# --- the three ways ---


def test_neighbours_are_weighted_and_what_is_unknown_has_no_weight() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    known = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 4.0], [5.0, 8.0]])
    found = neighbours(3, 0.5, train, torch.tensor([[1.0, 0.0]]), known, torch.device("cpu"))
    weights = np.exp(np.array([1.0, 0.8, 0.0]) / 0.5)
    expected = weights[0] / (weights[0] + weights[2])
    np.testing.assert_allclose(found, [[expected, 4.0]], rtol=1e-6)
    (alone,) = neighbours(2, 0.5, train, torch.tensor([[1.0, 0.0]]), known, torch.device("cpu"))
    assert alone.tolist() == [1.0, 6.0], "of none of them: the mean of all"


def test_a_precision_is_that_of_what_is_known() -> None:
    scores, known = np.array([0.9, 0.8, 0.7, 0.1]), np.array([1.0, np.nan, 0.0, 1.0])
    assert precision_of(scores, known) == average_precision_score([1, 0, 1], [0.9, 0.7, 0.1])
    assert np.isnan(precision_of(scores, np.array([1.0, np.nan, 1.0, 1.0])))


def test_a_given_strength_is_taken(folder: Path) -> None:
    settings = [_found(_config(folder, "labels", c=c))["settings"] for c in (0.5, None)]
    assert settings[0] == {"c": 0.5}
    assert settings[1]["c"] in (0.001, 0.01, 0.1, 1.0, 10.0)
    assert settings[1]["c_chosen_on_samples"] in range(14, 19)  # a fifth of 80, by label


def test_numbers_known_of_other_images_are_learnt_from_theirs() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    known = np.stack([x[:, 0].numpy(), 5 * x[:, 1].numpy() + 2, x[:, 2].numpy()], 1).astype(float)
    told = known.copy()
    told[::2, 1] = np.nan
    found, chosen = linear(None, 0, x, x, told, are_labels=False)
    np.testing.assert_allclose(found, known, atol=0.05)
    assert len(chosen["penalties"]) == 3


def test_of_too_few_samples_no_strength_is_chosen() -> None:
    x, known = torch.randn(2, 3), np.array([[0.0], [1.0]])
    assert linear(None, 0, x, x, known, are_labels=True)[1] == {"c": 1.0, "c_chosen_on_samples": 0}


@pytest.mark.parametrize("by", ["linear", "knn"])
def test_what_training_does_not_tell_is_left_out(folder: Path, tmp_path: Path, by: Any) -> None:
    table = tmp_path / "unknown.csv"
    rows = (folder / "labels.csv").read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f"{row.rsplit(',', 2)[0]},,0" for row in rows[1:])]))
    out = tmp_path / "unknown.beton"
    pack(str(folder / "images"), out, PackConfig(targets=table, workers=1), progress=False)
    report = _found(_config(folder, "labels", train=(out,), by=by))
    assert list(report["by_target"]) == ["red"]
    note = "left out, not two values among the training images: bright, never"
    assert report["notes"] == [note]


# --- what cannot be meant ---


def test_files_without_targets_or_with_others_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none.beton: has no targets; pack it with .*--targets"):
        targets(_config(folder, "none"))
    config = _config(folder, "labels", test=(folder / "numbers.beton",))
    with pytest.raises(DataError, match=r"its targets \(red, brightness\) are not those of"):
        targets(config)


def test_settings_that_contradict_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--layer goes with --by linear or knn"):
        _config(folder, "labels", by="finetune", layer="layer3")
    with pytest.raises(ConfigError, match=r"--kind labels: some targets are neither 0 nor 1"):
        targets(_config(folder, "numbers", kind="labels"))
    with pytest.raises(ConfigError, match=r"pixels:4 has nothing to train"):
        targets(_config(folder, "labels", by="finetune"))
