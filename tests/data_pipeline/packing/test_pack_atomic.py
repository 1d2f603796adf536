"""A pack that fails or is killed leaves what was there before, whole, and nothing else."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import DataError
from common.files import atomic_file
from data_pipeline.packing import pack as pack_module
from tests.data_pipeline.betons import check_beton
from tests.data_pipeline.packed import children, left_in, packed, photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


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
from data_pipeline.packing import pack as module
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
