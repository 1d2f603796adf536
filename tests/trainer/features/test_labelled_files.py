import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError, DataError
from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from tests.data_pipeline.packed import packed
from tests.trainer.runs import SMALL_ENCODER, metrics, train
from tests.trainer.saved_runs import saved_run
from tests.trainer.tiny import tiny_config
from trainer.config import DataConfig, to_json
from trainer.evaluation.finetune import FinetuneConfig, finetune
from trainer.evaluation.knn import KnnConfig, knn
from trainer.evaluation.linear import ProbeConfig, linear
from trainer.evaluation.load_encoder import run_preprocessing
from trainer.evaluation.retrieve import RetrieveConfig, retrieve
from trainer.features.extraction import default_resize
from trainer.features.online_knn import OnlineKnn, OnlineKnnConfig

COLOURS = {"a": (220, 30, 30), "b": (30, 220, 30), "c": (30, 30, 220), "x": (220, 220, 30)}
READER = LoaderConfig(backend="torchvision", workers=1)
PIXELS = {"source": "pixels:8", "loader": READER, "device": "cpu"}


def colours(folder: Path, *names: str, seed: int = 0) -> Path:
    """A .beton of 12 images a class, each class of its own colour."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.array(COLOURS[name]) + rng.normal(0, 12, (8, 8, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number}.png")
    out = folder.with_suffix(".beton")
    packed(folder, out)
    return out


def without_names(beton: Path) -> Path:
    manifest_path(beton).unlink()
    return beton


def top1(train: Path, test: Path) -> float:
    config = KnnConfig(**PIXELS, train=train, test=test, k=(5,))
    report = knn(config)
    assert report is not None
    return float(report["top1"])


def online(train: Path, test: Path) -> dict[str, float]:
    watcher = OnlineKnn(OnlineKnnConfig(k=5), OpenData(train), OpenData(test), 8, READER, 0, 1)
    try:
        cpu = torch.device("cpu")
        return watcher.evaluate(torch.nn.Flatten(), Augment(AugmentConfig(), 0), cpu, torch.float32)
    finally:
        watcher.close()


def test_classes_are_compared_by_name_where_their_numbers_differ(tmp_path: Path) -> None:
    abc, ac = colours(tmp_path / "abc", "a", "b", "c"), colours(tmp_path / "ac", "a", "c", seed=1)
    assert top1(abc, ac) == 1.0
    assert online(abc, ac)["knn_top1"] == 1.0


def test_a_linear_probe_and_a_fine_tuning_learn_the_classes_by_name(tmp_path: Path) -> None:
    abc, ac = colours(tmp_path / "abc", "a", "b", "c"), colours(tmp_path / "ac", "a", "c", seed=1)
    probed = linear(ProbeConfig(**PIXELS, train=abc, test=ac))
    assert probed is not None
    assert probed["protocol"] == "logistic"
    assert probed["top1"] == 1.0
    run = saved_run(tmp_path, abc, SMALL_ENCODER)
    settings = {**PIXELS, "source": str(run), "train": abc, "test": ac}
    tuned = finetune(FinetuneConfig(**settings))
    assert tuned is not None
    assert tuned["top1"] > 0.9


@pytest.mark.parametrize("compare", [top1, online])
def test_classes_that_were_never_learnt_are_refused_by_name(
    tmp_path: Path, compare: object
) -> None:
    ab, xb = colours(tmp_path / "ab", "a", "b"), colours(tmp_path / "xb", "b", "x")
    with pytest.raises(DataError, match=r"xb.beton: 1 of its 2 classes are not in .*'x' \(there: "):
        compare(ab, xb)  # type: ignore[operator]


@pytest.mark.parametrize("compare", [top1, online])
def test_without_names_other_numbers_are_refused(tmp_path: Path, compare: object) -> None:
    abc = colours(tmp_path / "abc", "a", "b", "c")
    ac = without_names(colours(tmp_path / "ac", "a", "c", seed=1))
    with pytest.raises(DataError, match=r"ac.beton give no names.*nobody can tell"):
        compare(abc, ac)  # type: ignore[operator]


def test_without_names_equal_numbers_are_believed_and_the_doubt_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ab = colours(tmp_path / "ab", "a", "b")
    other = without_names(colours(tmp_path / "other", "a", "b", seed=1))
    with caplog.at_level(logging.WARNING):
        assert online(ab, other)["knn_top1"] == 1.0
    assert "other.beton give no names of classes (no manifest FILE.beton.json" in caplog.text
    assert "matched by their numbers" in caplog.text


def test_a_name_of_two_classes_tells_nothing(tmp_path: Path) -> None:
    ab, ba = colours(tmp_path / "ab", "a", "b"), colours(tmp_path / "abc", "a", "b", "c", seed=1)
    for path, names in ((ab, ["a", "a"]), (ba, ["b", "a", "c"])):
        manifest = json.loads(manifest_path(path).read_text())
        manifest_path(path).write_text(json.dumps({**manifest, "classes": names}))
    with pytest.raises(DataError, match="two classes are named 'a'"):
        top1(ab, ba)


def test_a_search_judges_by_names_and_not_at_all_without(tmp_path: Path) -> None:
    abc, ac = colours(tmp_path / "abc", "a", "b", "c"), colours(tmp_path / "ac", "a", "c", seed=1)
    config = RetrieveConfig(**PIXELS, train=abc, query=(ac,), k=1)
    judged = retrieve(config)
    assert judged is not None
    assert judged["mean_average_precision"] == 1.0
    without_names(ac)
    blind = retrieve(config)
    assert blind is not None
    assert blind["mean_average_precision"] is None
    assert any("nobody can tell" in note for note in blind["notes"])


def test_a_best_figure_of_other_data_is_not_one_to_beat(tmp_path: Path) -> None:
    abc = colours(tmp_path / "abc", "a", "b", "c")
    easy, hard = colours(tmp_path / "easy", "a", "c", seed=1), tmp_path / "hard.beton"
    noise = tmp_path / "hard"
    for name in "abc":
        (noise / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(noise / name / f"{number}.png")
    packed(noise, hard)
    config = tiny_config(
        abc, tmp_path / "run", encoder=SMALL_ENCODER, steps=4, knn=OnlineKnnConfig(every_epochs=1)
    )
    config = dataclasses.replace(config, batch=12)
    first = dataclasses.replace(config, data=DataConfig(train=(abc,), test=(easy,)))
    assert train(1, first, stop_at=3) == "stopped"
    assert metrics(config.out)[2]["knn_best_top1"] > 0.5
    assert (
        train(1, dataclasses.replace(config, data=DataConfig(train=(abc,), test=(hard,)))) == "done"
    )
    last = metrics(config.out)[-1]
    assert last["knn_best_top1"] == last["knn_top1"] == pytest.approx(1 / 3)


def test_a_run_says_the_size_that_every_evaluation_sees() -> None:
    """The training crop's by default, which need not be a size that the encoder is used at."""
    settings = {"crop": {"size": 32}, "augment": to_json(AugmentConfig()), "knn": {}}
    assert run_preprocessing(settings, "run").size == 32
    larger = run_preprocessing({**settings, "knn": {"size": 96}}, "run")
    assert (larger.size, larger.resize) == (96, default_resize(96))
    kept = run_preprocessing({**settings, "knn": {"size": 96, "resize": 100}}, "run")
    assert (kept.size, kept.resize) == (96, 100)
    with pytest.raises(ConfigError, match=r"knn\.size"):
        run_preprocessing({**settings, "knn": {"size": "wide"}}, "run")


def test_a_file_in_both_sets_is_said(tmp_path: Path) -> None:
    ab, bc = colours(tmp_path / "ab", "a", "b"), colours(tmp_path / "bc", "b", "c", seed=1)
    report = knn(KnnConfig(**PIXELS, train=(ab, bc), test=(bc,), k=(1,)))
    assert report is not None and report["top1"] == 1
    assert any(f"{bc}: is in both sets" in note for note in report["notes"])


def test_unlabelled_files_are_no_neighbours_online(tmp_path: Path) -> None:
    ab, flat = colours(tmp_path / "ab", "a", "b"), tmp_path / "flat.beton"
    colours(tmp_path / "c", "c")
    pack(str(tmp_path / "c"), flat, PackConfig(workers=1, labels=False), progress=False)
    test = colours(tmp_path / "test", "a", "b", seed=3)
    train = OpenData([flat, ab])
    watcher = OnlineKnn(OnlineKnnConfig(k=5), train, OpenData(test), 8, READER, 0, 1)
    look = torch.nn.Flatten(), Augment(AugmentConfig(), 0), torch.device("cpu"), torch.float32
    assert watcher.evaluate(*look)["knn_top1"] == 1.0
    watcher.close()
    with pytest.raises(DataError, match=r"flat\.beton: 12 of 12 samples have no label"):
        knn(KnnConfig(**PIXELS, train=(flat, ab), test=(test,), k=(1,)))


def test_queries_of_the_searched_files_do_not_find_themselves(tmp_path: Path) -> None:
    ab, bc = colours(tmp_path / "ab", "a", "b"), colours(tmp_path / "bc", "b", "c", seed=1)
    for query in ((bc,), (bc, ab)):
        found = retrieve(RetrieveConfig(**PIXELS, train=(ab, bc), query=query, k=3))
        assert found is not None
        for asked in found["queries"][:24]:  # samples of bc, the second of the searched files
            assert asked["sample"] + 24 not in [each["sample"] for each in asked["neighbours"]]
            assert asked["neighbours"][0]["similarity"] < 0.99999
