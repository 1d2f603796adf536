import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.pack import PackConfig, pack
from launch.__main__ import main
from tests.dist import run_ranks
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer.encoders import EncoderConfig

CLASSES = 3
RESNET18 = EncoderConfig(name="resnet18", stem="imagenet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and packed files of several kinds."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, count in (("train", 60), ("test", 30)):
        (folder / name).mkdir()
        pack_images(folder / name, count, CLASSES).rename(folder / f"{name}.beton")
        shutil.move(folder / name / "images.beton.json", folder / f"{name}.beton.json")
    images = folder / "test" / "images"
    pack(str(images), folder / "flat.beton", PackConfig(labels=False), progress=False)
    (images / "class1").rename(images / "class9")
    pack(str(images), folder / "renamed.beton", PackConfig(), progress=False)
    save_run(folder / "run", folder / "train.beton", RESNET18)  # at 32 pixels: milliseconds
    assert main(["export", str(folder / "run"), "--out", str(folder / "r18.safetensors")]) == 0
    return folder


def evaluate(folder: Path, method: str, source: str, *words: str) -> dict[str, Any]:
    out = folder / "out.json"
    assert main(command(folder, method, source, *words, "--json", str(out))) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def command(folder: Path, method: str, source: str, *words: str) -> list[str]:
    return [
        "evaluate", method, source,
        "--data.train", str(folder / "train.beton"), "--data.test", str(folder / "test.beton"),
        "--backend", "torchvision", "--device", "cpu", "--workers", "1", *words,
    ]  # fmt: skip


def test_knn_writes_fractions_and_prints_percent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(folder, "knn", str(folder / "run"), "--k", "20")
    assert (result["n_train"], result["n_test"], result["num_classes"]) == (60, 30, CLASSES)
    assert 0.34 < result["top1"] <= 1.0
    assert result["top5"] == 1.0
    assert result["settings"]["k"] == 20
    assert result["settings"]["temperature"] == 0.07
    assert result["encoder"]["step"] == 6
    assert result["preprocessing"]["size"] == 32
    assert len(result["data"]["train"]["fingerprint"]) == 64
    said = capsys.readouterr().out
    assert f"top-1     {100 * result['top1']:.2f} %" in said
    assert f"top-{CLASSES}     100.00 %" in said


def test_k_above_the_training_samples_is_clipped_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(folder, "knn", str(folder / "run"))
    assert (result["settings"]["k"], result["settings"]["requested_k"]) == (60, 200)
    assert "k 200 is more than the 60 training samples" in capsys.readouterr().err


def test_an_exported_file_scores_as_its_run(folder: Path) -> None:
    run, exported = (
        evaluate(folder, "knn", str(folder / name), "--k", "5")
        for name in ("run", "r18.safetensors")
    )
    assert (run["top1"], run["settings"]) == (exported["top1"], exported["settings"])
    assert exported["encoder"]["kind"] == "exported"
    assert exported["encoder"]["sha256"]


def test_the_baselines_are_evaluated_like_any_encoder(folder: Path) -> None:
    for source, kind in (
        (f"untrained:{folder / 'run'}", "untrained"),
        ("pixels:16", "pixels"),
    ):
        result = evaluate(folder, "knn", source, "--k", "5")
        assert result["encoder"]["kind"] == kind
        assert 0 < result["top1"] <= 1
    assert result["encoder"]["feature_dim"] == 3 * 16 * 16


@pytest.mark.parametrize("protocol", ["auto", "cached", "canonical"])
def test_linear_protocols_learn_the_classes(
    folder: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--epochs", "20", "--linear-batch", "20", "--base-lr", "0.3"]
    result = evaluate(folder, "linear", str(folder / "run"), "--protocol", protocol, *words)
    assert result["protocol"] == ("logistic" if protocol == "auto" else protocol)
    assert result["top1"] > 0.5
    assert result["n_train"] == 60
    captured = capsys.readouterr()
    assert ("logistic was chosen for 60 samples x 512" in captured.err) == (protocol == "auto")
    if protocol != "auto":
        assert result["settings"]["steps"] == 60
        assert result["settings"]["peak_lr"] == pytest.approx(0.3 * 20 / 256)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_a_label_budget_takes_as_many_of_every_class(folder: Path, method: str) -> None:
    result = evaluate(folder, method, "pixels:8", "--labels-per-class", "4", "--seed", "3")
    assert result["n_train"] == 4 * CLASSES
    assert result["n_test"] == 30
    assert result["settings"]["labels_per_class"] == 4
    again = evaluate(folder, method, "pixels:8", "--labels-per-class", "4", "--seed", "3")
    assert again["top1"] == result["top1"]


def test_testing_on_the_training_file_is_remarked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(folder, "knn", "pixels:8", "--data.test", str(folder / "train.beton"))
    assert "have the same content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.test", "{folder}/flat.beton"], "flat.beton: 30 of 30 samples have no label"),
        (["--data.test", "{folder}/renamed.beton"], "class 1 is 'class1' in "),
        (["--data.test", "{folder}/none.beton"], "none.beton"),
        (["--labels-per-class", "21"], "ask for at most 20"),
        (["--labels-per-class", "0"], "at least 1"),
        (["--k", "0"], "k=0"),
        (["--temperature", "0"], "temperature=0"),
        (["--size", "64", "--resize", "32"], "--resize must be at least --size"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "tpu"], "tpu"),
        (["--json", "{folder}"], "is a folder"),
        (["--which", "first"], "first"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_gets_one_line_and_exit_code_2(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(folder=folder) for word in words]
    assert main(command(folder, "knn", "pixels:8", *filled)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "canonical", "--labels-per-class", "2"], "--protocol cached or logistic"),
        (["--protocol", "cached", "--base-lr", "1e30"], "lower base LR"),
        (["--c", "-1"], "C=-1"),
        (["--epochs", "0"], "epochs=0"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_linear_settings_that_cannot_work_are_refused(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, "linear", str(folder / "run"), *words)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("knn", []),
        ("linear", ["--protocol", "logistic", "--c", "1"]),
        ("linear", ["--protocol", "canonical", "--epochs", "3", "--linear-batch", "20"]),
    ],
    ids=["knn", "logistic", "canonical"],
)
def test_two_processes_give_the_result_of_one(
    folder: Path, tmp_path: Path, method: str, words: list[str]
) -> None:
    alone = evaluate(folder, method, str(folder / "run"), *words)
    out = tmp_path / "two.json"
    line = command(folder, method, str(folder / "run"), *words, "--json", str(out))
    first, second = run_ranks(_main, 2, line, init_process_group=False, timeout=120)
    assert "top-1" in first
    assert second == ""  # rank 0 speaks for all
    together = json.loads(out.read_text())
    assert together["processes"] == 2
    assert [together[key] for key in ("top1", "top5")] == [alone[key] for key in ("top1", "top5")]


def _main(rank: int, world_size: int, line: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(line) == 0
    assert not torch.distributed.is_initialized()
    return said.getvalue()
