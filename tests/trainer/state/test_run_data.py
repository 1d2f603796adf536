"""A run finds its data from any working folder, moved together too, and takes no other file."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig, absolute, differences, from_json, to_json
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.proof import proof_images
from trainer.loop import fit
from trainer.state.run_data import NoDataError, run_data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``images.beton`` and ``runs/x``, trained with relative paths from there."""
    place = tmp_path / "place"
    place.mkdir()
    pack_images(place, count=48)
    monkeypatch.chdir(place)
    fit(tiny_config(Path("images.beton"), Path("runs/x"), encoder=SMALL_ENCODER, steps=1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return place


def settings(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "config.json").read_text())
    return found


def test_a_run_finds_its_data_wherever_it_is_looked_for(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, data = place / "runs" / "x", place / "images.beton"
    assert run_data(run, settings(run), "train") == (data,)
    # Another file of that name where the command is typed is not the run's.
    pack_images(tmp_path / "other", count=24)
    for name in ("images.beton", "images.beton.json"):
        shutil.copy(tmp_path / "other" / name, name)
    _, source = proof_images(run, settings(run), Preprocessing(size=32, resize=32))
    assert source == str(data)

    moved = place.rename(tmp_path / "moved")
    run = moved / "runs" / "x"
    assert run_data(run, settings(run), "train") == (moved / "images.beton",)

    for name in ("images.beton", "images.beton.json"):
        shutil.copy(name, moved / name)
    with pytest.raises(NoDataError, match=r"moved/images.beton is another file than the run's"):
        run_data(run, settings(run), "train")
    with caplog.at_level(logging.WARNING):
        _, source = proof_images(run, settings(run), Preprocessing(size=32, resize=32))
    assert source == "embedded:digits"
    assert "is another file than the run's --data.train was; the proof uses" in caplog.text

    (moved / "images.beton").unlink()
    with pytest.raises(NoDataError, match=r"place/images.beton is not there any more"):
        run_data(run, settings(run), "train")


def test_an_older_run_with_relative_paths_is_seen_from_its_own_folder(
    place: Path, tmp_path: Path
) -> None:
    run = place / "runs" / "x"
    old = {**settings(run), "data": {"train": "images.beton"}, "out": "runs/x"}
    Path("images.beton").write_bytes(b"another file")
    assert run_data(run, old, "train") == (place / "images.beton",)


def test_a_run_had_no_such_data(tmp_path: Path) -> None:
    for data in ({}, {"test": None}, {"test": 7}, None):
        with pytest.raises(NoDataError, match=r"the run had no --data\.test"):
            run_data(tmp_path, {"data": data}, "test")


def test_paths_are_compared_by_what_they_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(Path("a.beton"), Path("x"), init_from=Path("w.pth"))
    saved = to_json(absolute(config))
    assert saved["data"]["train"] == [str(tmp_path / "a.beton")]
    again = from_json(RunConfig, {**saved, "init_from": "w.pth"})
    assert not differences(saved, to_json(absolute(again)))
