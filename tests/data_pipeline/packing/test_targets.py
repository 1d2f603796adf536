"""Targets of a table: packed beside the label, proved and read again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.beton import MAX_TARGETS
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData

HEAD = "file,round,weight in kg\n"
ROWS = ["a/0.png,1,0.5", "a/1.png,0,", "b/2.png,,-3e2", "b/3.png,1,7"]
KNOWN = [[1, 0.5], [0, np.nan], [np.nan, -300], [1, 7]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in ROWS:
        path = tmp_path / "images" / row.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = int(path.stem)
        Image.fromarray(np.full((8, 8, 3), 40 * shade, np.uint8)).save(path)
    return tmp_path / "images"


def _pack(folder: Path, text: str, name: str = "x") -> OpenData:
    table = folder.parent / f"{name}.csv"
    table.write_text(text, encoding="utf-8")
    out = folder.parent / f"{name}.beton"
    pack(str(folder), out, PackConfig(targets=table, workers=1), progress=False)
    return OpenData(out)


def test_targets_are_read_as_the_table_has_them_in_whatever_order(folder: Path) -> None:
    data = _pack(folder, HEAD + "\n".join([*reversed(ROWS), "elsewhere.png,1,1", ""]))
    assert data.info.target_names == ("round", "weight in kg")
    np.testing.assert_array_equal(data.table.targets, KNOWN)
    padded = HEAD + "\n".join(f"./{row}".replace(",", " , ") for row in ROWS)
    np.testing.assert_array_equal(_pack(folder, padded, "padded").table.targets, KNOWN)
    assert data.table.labels.tolist() == [0, 0, 1, 1]
    assert data.info.class_names == ("a", "b")
    pixels = data.read(3)
    assert (pixels == 120).all(), "images are where they were"


def test_ffcv_reads_such_a_file(folder: Path) -> None:
    ffcv = pytest.importorskip(
        "ffcv.reader", reason="reads what FFCV itself reads: it is not built"
    )
    data = _pack(folder, HEAD + "\n".join(ROWS))
    reader = ffcv.Reader(str(data.info.paths[0]))
    np.testing.assert_array_equal(reader.metadata["f2"], [row[0] for row in KNOWN])
    assert reader.field_names == ["image", "label", "target0", "target1"]


def test_without_its_manifest_a_file_has_targets_by_number(folder: Path) -> None:
    data = _pack(folder, HEAD + "\n".join(ROWS))
    path = data.info.paths[0]
    manifest_path(path).unlink()
    assert OpenData(path).info.target_names == ("target0", "target1")


def test_targets_are_part_of_the_content(folder: Path) -> None:
    texts = [HEAD + "\n".join(ROWS), HEAD + "\n".join([*ROWS[:3], "b/3.png,0,7"])]
    identities = [_pack(folder, text, f"t{n}").info.identity for n, text in enumerate(texts)]
    assert len(set(identities)) == 2
    first = folder.parent / "t0.beton"
    again = _pack(folder, texts[0], "again").info.paths[0]
    assert first.read_bytes() == again.read_bytes()


def test_a_set_has_the_targets_of_all_its_files(folder: Path) -> None:
    first = _pack(folder, HEAD + "\n".join(ROWS), "first").info.paths[0]
    text = HEAD + "\n".join([*ROWS[:3], "b/3.png,0,8"])
    second = _pack(folder, text, "second").info.paths[0]
    both = OpenData([first, second])
    np.testing.assert_array_equal(both.table.targets[:4], KNOWN)
    assert both.table.targets[7].tolist() == [0, 8]
    other = _pack(folder, text.replace("round", "square"), "other").info.paths[0]
    both = OpenData([first, other])
    assert both.info.target_names == ("round", "weight in kg", "square")
    np.testing.assert_array_equal(both.table.targets[7], [np.nan, 8, 0])
    plain = folder.parent / "plain.beton"
    pack(str(folder), plain, PackConfig(workers=1, quality=80, format="jpeg"), progress=False)
    both = OpenData([plain, first])
    assert np.isnan(both.table.targets[:4]).all()
    np.testing.assert_array_equal(both.table.targets[4:], KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEAD + "\n".join(ROWS[1:]),
            r"no row for 1 of 4 images: the data has a/0.png, and the table a/1",
        ),
        (HEAD + "\n".join([*ROWS, ROWS[0]]), r"x.csv: line 6: a/0.png is there twice"),
        (HEAD + "a/0.png,1", r"x.csv: line 2: 2 columns, the head has 3"),
        (HEAD + "a/0.png,1,heavy", r"x.csv: line 2: 'heavy' is no number"),
        (HEAD + "a/0.png,1,inf", r"x.csv: line 2: 'inf' is no number"),
        ("file,a,a\n", r"x.csv: line 1 must name the file's column and different targets"),
        ("", r"x.csv: line 1 must name"),
        (
            "file," + ",".join(f"t{n}" for n in range(MAX_TARGETS + 1)),
            rf"{MAX_TARGETS + 1} targets; a .beton has room for {MAX_TARGETS}",
        ),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _pack(folder, text)
    assert not (folder.parent / "x.beton").exists()


def test_a_missing_table_is_named(folder: Path, tmp_path: Path) -> None:
    config = PackConfig(targets=tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"--targets .*none.csv: cannot be read"):
        pack(str(folder), tmp_path / "y.beton", config, progress=False)


def test_as_many_targets_as_there_is_room_for(folder: Path) -> None:
    names = ",".join(f"t{n}" for n in range(MAX_TARGETS))
    rows = "\n".join(row.split(",")[0] + ",1" * MAX_TARGETS for row in ROWS)
    assert _pack(folder, f"file,{names}\n{rows}").table.targets.shape == (4, MAX_TARGETS)
