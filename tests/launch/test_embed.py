"""``widebatch embed``: every row is the image's that its line says, however it is written."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from common.errors import ConfigError
from data_pipeline.reading.pool import LoaderConfig
from launch.__main__ import main
from tests.dist import run_ranks
from tests.launch.evaluated import READING, main_on_a_rank, make_folder
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.open_images import open_images

LOADER = LoaderConfig(backend="torchvision", workers=1)  # as READING has it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("evaluated"))


def _embed(folder: Path, out: Path, *data: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    given = [str(path) for path in data]
    line = ["embed", str(folder / "run"), *READING, "--out", str(out)]
    assert main([*line, *(["--data", *given] if given else [])]) == 0
    table = Path(f"{out}.csv")
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    return json.loads(Path(f"{out}.json").read_text()), rows


def _each_alone(folder: Path, images: list[Path]) -> np.ndarray:
    """Features of images, each opened by itself."""
    rows = []
    for image in images:
        config = JobConfig(source=str(folder / "run"), device="cpu", loader=LOADER)
        with Job(config) as job, open_images([image], "--data") as opened:
            rows.append(job.features(opened.data).features_NF)
    return torch.cat(rows).numpy()


def test_every_row_is_the_image_of_its_line(folder: Path, tmp_path: Path) -> None:
    images = folder / "test" / "images"
    told, table = _embed(folder, tmp_path / "f.npy", images)
    rows = np.load(tmp_path / "f.npy")
    assert rows.shape == (30, told["feature_dim"]) and rows.dtype == np.float32
    assert told["encoder"]["feature_dim"] == 512 and told["rows"] == len(table) == 30
    assert [int(row["id"]) for row in table] == list(range(30))
    assert all(row["class"] == row["file"].split("/")[0] for row in table)
    few = [3, 17, 29]
    alone = _each_alone(folder, [images / table[n]["file"] for n in few])
    np.testing.assert_allclose(rows[few], alone, rtol=1e-4, atol=1e-5)
    assert np.abs(rows[few] - alone[[1, 2, 0]]).max() > 1e-2, "a control: they are not all alike"


def test_kinds_of_files_hold_the_same(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: setup.sh bench")
    data = folder / "test.beton"
    _, table = _embed(folder, tmp_path / "f.npy", data)
    rows = np.load(tmp_path / "f.npy")
    _embed(folder, tmp_path / "g.safetensors", data)
    tensors = safetensors.numpy.load_file(tmp_path / "g.safetensors")
    assert np.array_equal(tensors["features"], rows)
    assert tensors["labels"].tolist() == [int(row["label"]) for row in table]
    _embed(folder, tmp_path / "h.parquet", data)
    columns = parquet.read_table(tmp_path / "h.parquet").to_pydict()
    assert np.array_equal(np.array(columns.pop("features"), np.float32), rows)
    assert {name: list(map(str, values)) for name, values in columns.items()} == {
        name: [row[name] for row in table] for name in table[0]
    }
    assert not (tmp_path / "h.parquet.csv").exists()


def test_without_data_it_is_what_the_run_trained_on(folder: Path, tmp_path: Path) -> None:
    told, table = _embed(folder, tmp_path / "f.npy")
    assert told["data"]["train"]["path"] == str(folder / "train.beton")
    assert len(table) == 60


def test_image_files_keep_their_order_and_damaged_ones_are_told(
    folder: Path, tmp_path: Path
) -> None:
    first, second = sorted((folder / "test" / "images").rglob("*.png"))[:2]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(first.read_bytes()[:50])
    told, table = _embed(folder, tmp_path / "f.npy", second, damaged, first)
    assert [row["file"] for row in table] == [str(second), str(first)]
    assert [row["label"] for row in table] == ["", ""]
    (left_out,) = told["left_out"]
    assert left_out["image"] == str(damaged) and any("1 images" in note for note in told["notes"])


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_the_same_on_any_number_of_processes(
    folder: Path, tmp_path: Path, world_size: int
) -> None:
    _embed(folder, tmp_path / "one.npy", folder / "test.beton")
    out = tmp_path / "many.npy"
    line = ["embed", str(folder / "run"), *READING, "--out", str(out)]
    line += ["--data", str(folder / "test.beton")]
    said = run_ranks(main_on_a_rank, world_size, line, init_process_group=False)
    assert "30 of" in said[0] and not any(said[1:])
    one, many = (np.load(tmp_path / f"{name}.npy") for name in ("one", "many"))
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
    tables = [(tmp_path / f"{name}.npy.csv").read_bytes() for name in ("one", "many")]
    assert tables[0] == tables[1]


def test_what_is_passed_over_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "test" / "images", tmp_path / "images")
    (tmp_path / "images" / "top.png").write_bytes(b"")
    told, table = _embed(folder, tmp_path / "f.npy", tmp_path / "images")
    assert told["notes"] == ["1 files passed over: outside the class folders"]
    assert told["data"]["train"]["paths"] == [str(tmp_path / "images")] and len(table) == 30


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_names_of_any_bytes_are_written(folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: setup.sh bench")
    of_class = tmp_path / os.fsdecode(b"images/cl\xe9")
    of_class.mkdir(parents=True)
    shutil.copy(next((folder / "test" / "images").rglob("*.png")), of_class / "a.png")
    line = ["embed", str(folder / "run"), *READING, "--data", str(of_class.parent)]
    assert main([*line, "--out", str(tmp_path / f"f.{kind}")]) == 0
    if kind == "npy":
        assert b"0,cl\xe9/a.png,0,cl\xe9" in (tmp_path / "f.npy.csv").read_bytes()


def test_an_own_file_is_replaced_and_another_is_not(folder: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "f.npy", tmp_path / "f.npy.csv"
    _embed(folder, out, folder / "test.beton")
    _embed(folder, out, folder / "train.beton")
    assert len(np.load(out)) == 60
    Path(f"{out}.json").unlink()
    table.write_text("somebody's")
    line = ["embed", str(folder / "run"), *READING, "--out", str(out)]
    assert main(line) == 2 and table.read_text() == "somebody's"


def test_json_is_an_output_like_the_others(folder: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "f.npy", tmp_path / "told.json"
    line = ["embed", str(folder / "run"), *READING, "--out", str(out), "--json"]
    told.write_text('{"precious": 1}')
    assert main([*line, str(told)]) == 2 and told.read_text() == '{"precious": 1}'
    told.unlink()
    assert main([*line, str(told)]) == main([*line, str(told)]) == 0
    assert json.loads(told.read_text())["rows"] == 60
    for same in (out, tmp_path / "f.npy.csv"):
        assert main([*line, str(same)]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_takes_away_what_was_packed(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    script = f"""
import os, signal
from pathlib import Path
from trainer.evaluation.open_images import open_images
with open_images([Path({str(folder / "test" / "images")!r})], "--data"):
    assert os.listdir({str(tmp_path)!r})
    os.kill(os.getpid(), {number.value})
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, timeout=200
    )
    assert done.returncode and not list(tmp_path.iterdir())


def test_a_tar_is_embedded_as_its_folder(folder: Path, tmp_path: Path) -> None:
    images = folder / "test" / "images"
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, "images")
        tar.addfile(tarfile.TarInfo("images/class1/empty.png"))
    _embed(folder, tmp_path / "a.npy", images)
    told, table = _embed(folder, tmp_path / "b.npy", tmp_path / "images.tar")
    assert [each["image"] for each in told["left_out"]] == [
        str(tmp_path / "images.tar/images/class1/empty.png")
    ]
    rows = [np.load(tmp_path / f"{name}.npy") for name in "ab"]
    assert sorted(map(bytes, rows[0])) == sorted(map(bytes, rows[1]))
    assert table[0]["file"].startswith("images.tar/images/class")


def _refused(rank: int, world_size: int, line: list[str]) -> int:
    return main(line)


def test_several_processes_want_what_is_packed(folder: Path, tmp_path: Path) -> None:
    line = ["embed", str(folder / "run"), *READING, "--out", str(tmp_path / "f.npy")]
    line += ["--data", str(folder / "test" / "images")]
    assert run_ranks(_refused, 2, line, init_process_group=False) == [2, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "f.txt"], "--out f.txt: name a file that ends in .npy, .safetensors, .parquet"),
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["--data", "{run}", "{run}"], "name .beton files, one folder, one .tar, or image files"),
        (["--out", "{run}/config.npy/f.npy"], "config.npy"),
        (["--out", "{run}/config.npy"], "config.npy exists and is not of 'widebatch embed'"),
        (["--out", "{run}/../r18.safetensors"], "exists and is not of 'widebatch embed'"),
        (["--data"], "--data: name .beton files, one folder, one .tar, or image files"),
    ],
)
def test_what_cannot_be_is_told(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    (run / "config.npy").write_bytes(b"")  # a file where a folder would have to be
    filled = [word.format(run=run) for word in words]
    assert main(["embed", str(run), *READING, *filled]) != 0
    assert message in capsys.readouterr().err


def test_no_pyarrow_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainer.evaluation.embed import EmbedConfig

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        EmbedConfig(source="pixels:8", train=(tmp_path,), out=tmp_path / "f.parquet")
