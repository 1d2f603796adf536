"""Packing as a whole: the same bytes everywhere, everything accounted for, whole or not at all."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import atomic_file, pack_workers
from data_pipeline import pack as pack_module
from data_pipeline.beton import JPEG_MODE, check_beton, read_sample_table
from data_pipeline.errors import DataError
from data_pipeline.image_codec import CodecConfig, LeftOut, Stored
from data_pipeline.pack import PackConfig, PackReport, pack
from data_pipeline.pack_workers import Chunk, WorkerDiedError, encode_in_order
from data_pipeline.sources import ArraySource
from launch import __main__ as command_line
from tests.data_pipeline import images


def packed(source: object, out: Path, **settings: object) -> PackReport:
    config = PackConfig(**{"workers": 1} | settings)  # type: ignore[arg-type]
    return pack(str(source), out, config, progress=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 JPEGs in 5 classes, with a file of every odd kind between them."""
    folder = images.class_folders(tmp_path_factory.mktemp("photos"), classes=5, images=40)
    odd = {
        "class 0/grey.png": images.png("L"),
        "class 1/turned.jpg": images.turned_jpeg(6),
        "class 1/cmyk.jpg": images.cmyk_jpeg(),
        "class 2/alpha.png": images.png("RGBA", 200, 300),
        "class 3/deep.png": images.png("I;16"),
        "class 0/cut.jpg": images.jpeg()[:-200],
        "class 2/empty.jpg": b"",
        "class 4/text.jpg": b"this is no image",
        "class 4/bomb.png": images.bomb_png(),
        "class 4/notes.txt": b"notes",
        "class 4/.hidden.jpg": images.jpeg(),
    }
    return images.write_folder(folder, odd)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the result ----


def test_everything_is_accounted_for(photos: Path, tmp_path: Path) -> None:
    report = packed(photos, tmp_path / "x.beton")
    assert report.num_samples == 205
    assert report.class_names == tuple(f"class {c}" for c in range(5))
    assert dict(report.left_out) == {
        "class 0/cut.jpg": "damaged JPEG: Premature end of JPEG file",
        "class 2/empty.jpg": "empty file",
        "class 4/bomb.png": "far more pixels than max_pixels = 67108864",
        "class 4/text.jpg": "not an image",
    }
    assert report.passed_over == {"hidden": 1, "not an image file (.txt)": 1}
    assert report.fates == {"encoded as JPEG": 2, "passed through": 200, "stored raw": 3}
    assert report.changes["turned upright"] == 1
    manifest = json.loads((tmp_path / "x.beton.json").read_bytes())
    assert manifest["count"] == 205
    assert manifest["class_counts"] == [41, 42, 41, 41, 40]
    assert manifest["fates"] == report.fates | {"left out": 4}
    assert [tuple(entry.values()) for entry in manifest["left_out"]] == list(report.left_out)
    assert manifest["changed"]["CMYK to RGB"] == {"count": 1, "first_1000": ["class 1/cmyk.jpg"]}
    assert manifest["passed_over"]["hidden"]["first_1000"] == ["class 4/.hidden.jpg"]
    assert manifest["settings"]["quality"] == 90
    info = check_beton(tmp_path / "x.beton", verify=True)
    assert (info.num_samples, info.fingerprint) == (205, report.fingerprint)
    assert hashlib.sha256((tmp_path / "x.beton").read_bytes()).hexdigest() == report.fingerprint


def test_any_number_of_workers_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        packed(photos, tmp_path / f"{workers}.beton", workers=workers)
    for suffix in (".beton", ".beton.json"):
        assert len({(tmp_path / f"{w}{suffix}").read_bytes() for w in (1, 2, 3)}) == 1


def test_every_image_comes_with_its_own_label(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "x.beton", workers=2)
    table = read_sample_table(tmp_path / "x.beton")
    data = (tmp_path / "x.beton").read_bytes()
    payloads = [data[s : s + n] for s, n in zip(table.offsets, table.sizes)]
    originals = {path.read_bytes(): path for path in photos.rglob("*.jpg")}
    found = [(originals.get(p), label) for p, label in zip(payloads, table.labels)]
    assert sum(path is not None for path, _ in found) == 200
    assert all(path.parent.name == f"class {label}" for path, label in found if path)
    names = [str(path.relative_to(photos)) for path, _ in found if path]
    assert names == sorted(names)


def test_no_image_is_above_max_side(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "x.beton", max_side=64)
    info = check_beton(tmp_path / "x.beton")
    assert max(info.max_height, info.max_width) == 64


def test_arrays_come_out_as_they_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    labels = np.arange(300) % 10
    source = ArraySource(pixels, labels, [str(i) for i in range(10)], {"kind": "test"})
    monkeypatch.setattr(pack_module, "open_source", lambda *a, **k: source)
    packed("arrays", tmp_path / "x.beton", workers=2)
    table = read_sample_table(tmp_path / "x.beton")
    np.testing.assert_array_equal(table.labels, labels)
    data = np.fromfile(tmp_path / "x.beton", np.uint8)
    for i, start in enumerate(table.offsets):
        np.testing.assert_array_equal(data[start : start + 3072], pixels[i].ravel())


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images.write_folder(tmp_path / "set", {"1.jpg": images.jpeg(), "2.jpg": images.jpeg()})
    packed(tmp_path / "set", tmp_path / "x.beton")
    info = check_beton(tmp_path / "x.beton")
    assert not info.has_label
    assert info.class_names == ()
    assert (read_sample_table(tmp_path / "x.beton").labels == -1).all()


def test_strict_refuses_what_it_would_leave_out(photos: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"class 0/cut\.jpg: damaged JPEG.*without --strict"):
            packed(photos, tmp_path / "x.beton", strict=True, workers=workers)
        assert left_in(tmp_path) == []


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    folder = images.write_folder(tmp_path / "set", {"a/1.jpg": b"", "a/2.jpg": b"x"})
    with pytest.raises(DataError, match=r"none of its 2 images can be used.*a/1\.jpg: empty file"):
        packed(folder, tmp_path / "x.beton")
    assert left_in(tmp_path) == ["set"]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_side": -1},
        {"quality": 0},
        {"quality": 101},
        {"format": "png"},
        {"workers": -1},
        {"max_pixels": 0},
        {"max_pixels": 1 << 30},
        {"extensions": ()},
        {"extensions": ("jpg",)},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(DataError):
        PackConfig(**settings)  # type: ignore[arg-type]


def test_a_target_that_cannot_be_written_is_refused_first(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        packed(photos, tmp_path / "folder.beton")
    with pytest.raises(DataError, match="does not exist; make it first"):
        packed(photos, tmp_path / "missing/x.beton")


# ---- whole or not at all ----


@pytest.fixture(params=["unnamed", "named"])
def temporaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to write under no name: a file system may know only the second."""
    if request.param == "named":
        monkeypatch.setattr(atomic_file, "_open_unnamed", lambda folder: None)


@pytest.fixture
def older(photos: Path, tmp_path: Path) -> Iterator[Path]:
    """A file packed earlier under the same name; it must outlive any failure, whole."""
    out = tmp_path / "x.beton"
    packed(photos / "class 0", out)
    before = [path.read_bytes() for path in (out, tmp_path / "x.beton.json")]
    yield out
    assert left_in(tmp_path) == ["x.beton", "x.beton.json"]
    assert [path.read_bytes() for path in (out, tmp_path / "x.beton.json")] == before
    check_beton(out, verify=True)


@pytest.mark.usefixtures("temporaries")
def test_a_newer_file_replaces_an_older_one(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    first = packed(photos / "class 0", out)
    second = packed(photos, out)
    assert first.fingerprint != second.fingerprint == check_beton(out, verify=True).fingerprint
    assert left_in(tmp_path) == ["x.beton", "x.beton.json"]


@pytest.mark.usefixtures("temporaries")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["append", "finish"])
def test_a_failing_write_leaves_what_was_there(
    photos: Path, older: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pack_module.BetonWriter, place, fail)
    with pytest.raises(type(error)) as raised:
        packed(photos, older, workers=2)
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(older)


@pytest.mark.usefixtures("temporaries")
def test_a_failing_fsync_leaves_what_was_there(
    photos: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            packed(photos, older)


def test_a_pack_torn_between_its_two_files_is_found_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the manifest got its name and before the images did."""
    out = tmp_path / "x.beton"
    packed(photos / "class 0", out)
    publish = atomic_file.AtomicFile.publish

    def torn(self: atomic_file.AtomicFile) -> None:
        if self._path.suffix == ".beton":
            raise KeyboardInterrupt
        publish(self)

    monkeypatch.setattr(atomic_file.AtomicFile, "publish", torn)
    with pytest.raises(KeyboardInterrupt):
        packed(photos, out)
    with pytest.raises(DataError, match=r"describes another file than x\.beton"):
        check_beton(out)
    # Where nothing was before, nothing is left.
    with pytest.raises(KeyboardInterrupt):
        packed(photos, tmp_path / "new.beton")
    assert left_in(tmp_path) == ["x.beton", "x.beton.json"]


# ---- processes ----


def arrays(count: int, size: int = 8) -> Iterator[Chunk]:
    for i in range(count):
        yield [(i, np.full((size, size, 3), i % 251, np.uint8))]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_however_slow_the_first_is(workers: int) -> None:
    slow = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)
    chunks: list[Chunk] = [[(0, slow)], *[[(i, images.picture(8, 8))] for i in range(1, 60)]]
    config = CodecConfig(format="jpeg")
    results = list(encode_in_order(iter(chunks), config, workers))
    assert [index for index, _ in results] == list(range(60))
    assert all(isinstance(result, Stored) for _, result in results)


def test_little_is_held_back_behind_a_slow_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded: others wait in their pipes until the first image is through."""
    monkeypatch.setattr(pack_workers, "_BUFFER_BYTES", 1 << 20)
    held = []
    receive = pack_workers._Pool._receive

    def watch(self: pack_workers._Pool, worker: pack_workers._Worker) -> None:
        receive(self, worker)
        held.append(self._ready_bytes)

    monkeypatch.setattr(pack_workers._Pool, "_receive", watch)
    slow = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), np.uint8)
    fast = np.full((200, 200, 3), 7, np.uint8)  # 120 kB raw each

    def chunks() -> Iterator[Chunk]:
        yield [(0, slow)]
        for i in range(1, 300):
            yield [(i, fast)]

    results = encode_in_order(chunks(), CodecConfig(format="raw"), 2)
    assert [index for index, _ in results] == list(range(300))
    assert max(held) < (2 << 20) + slow.nbytes


def children() -> set[int]:
    return set(map(int, Path("/proc/self/task", str(os.getpid()), "children").read_text().split()))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_process_is_an_error_and_never_a_hang(number: signal.Signals) -> None:
    before = children()
    results = encode_in_order(arrays(100_000), CodecConfig(), 2)
    for _ in zip(range(2000), results):  # by now both processes have work in hand
        pass
    victim = min(children() - before)
    os.kill(victim, number)
    with pytest.raises(WorkerDiedError, match=f"killed by {number.name}") as raised:
        list(results)
    assert raised.value.index is not None
    assert children() <= before


@pytest.mark.timeout(60)
def test_a_killed_process_leaves_no_file(photos: Path, older: Path) -> None:
    killed = threading.Event()
    before = children()

    def kill_one() -> None:
        while not killed.is_set():
            for child in children() - before:
                os.kill(child, signal.SIGKILL)
                killed.set()
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(ChildProcessError, match=r"a packing process died .*killed by SIGKILL"):
            packed(photos, older, workers=2)
    finally:
        killed.set()
        killer.join()
    assert children() <= before


_SLOW_PACK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from data_pipeline import pack as module
append = module.BetonWriter.append
def slow(self, *a):
    append(self, *a)
    print("packing", flush=True)
    time.sleep(0.05)
module.BetonWriter.append = slow
from launch.__main__ import main
sys.exit(main(["pack", sys.argv[1], sys.argv[2], "--workers", "2"]))
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_an_interrupted_pack_leaves_neither_files_nor_processes(
    photos: Path, older: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_PACK, str(photos), str(older)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a packing process outlived its parent"
        time.sleep(0.05)


# ---- the command ----


def test_the_command_says_what_became_of_the_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.beton"
    words = ["pack", str(photos), str(out), "--workers", "1", "--max-side", "500"]
    assert command_line.main([*words, "--quality", "90"]) == 0
    said = capsys.readouterr().out
    assert "205 images, 5 classes" in said
    assert "4 images LEFT OUT" in said
    assert "class 2/empty.jpg: empty file" in said
    assert check_beton(out).fingerprint in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "x.beton"], "neither a folder nor"),
        (["cifar10", "x.beton"], "--download fetches it"),
        ([".", "x.beton", "--quality", "200"], "quality 200"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["pack", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert left_in(tmp_path) == []


def test_without_a_terminal_progress_is_lines(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pack(str(photos), tmp_path / "x.beton", PackConfig(workers=1))
    assert "packing x.beton: 209 of 209 images" in caplog.text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, argparse; from launch import pack_command;"
        "pack_command.add_parser(argparse.ArgumentParser().add_subparsers());"
        "assert not {'torch', 'numpy', 'PIL', 'ffcv'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_modes_of_passed_through_images_are_jpeg(photos: Path, tmp_path: Path) -> None:
    packed(photos / "class 0", tmp_path / "x.beton", format="jpeg")
    assert (read_sample_table(tmp_path / "x.beton").modes == JPEG_MODE).all()


def test_left_out_is_not_stored() -> None:
    (result,) = encode_in_order([[(5, "/nowhere/x.jpg")]], CodecConfig(), 1)
    assert result == (5, LeftOut("No such file or directory"))
