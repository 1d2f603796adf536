"""A file that changes while it is read ends the reading with one line, never by a signal."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.reading import open_beton
from data_pipeline.reading.open_beton import OpenBeton
from data_pipeline.reading.order import Position
from tests.data_pipeline.batches import open_train

BACKENDS = ("ffcv", "torchvision")
CHANGED = "cut or written over while it was read; put it back as it was"


@pytest.fixture
def copy(jpegs: Path, tmp_path: Path) -> Path:
    """Of a file without a manifest, for a test to ruin."""
    path = tmp_path / "copy.beton"
    path.write_bytes(jpegs.read_bytes())
    return path


def batches(path: Path, backend: str) -> Iterator[object]:
    with closing(open_train(path, backend)) as loader:
        yield from loader.starting_at(Position())


def take_those_read_before(running: Iterator[object]) -> None:
    """One batch is on its way to the device while the one before it is in use."""
    for _ in range(2):
        next(running)


def overwrite(path: Path, data: bytes) -> None:
    """As ``cp`` and ``rsync --inplace`` do: the file stays the same one."""
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 5000])
def test_a_file_cut_while_it_is_read_is_an_error(copy: Path, backend: str, left: int) -> None:
    running = batches(copy, backend)
    next(running)
    os.truncate(copy, left)
    with pytest.raises(DataError, match=CHANGED):
        take_those_read_before(running)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_file_written_over_it_is_never_trained_on(copy: Path, backend: str) -> None:
    running = batches(copy, backend)
    next(running)
    table, data = OpenBeton(copy).table, bytearray(copy.read_bytes())
    start = int(table.offsets[0])
    data[start : start + int(table.sizes[0])] = bytes(int(table.sizes[0]))
    overwrite(copy, data)
    with pytest.raises(DataError, match=CHANGED):
        take_those_read_before(running)


def test_a_file_that_is_touched_is_warned_of_once(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Users touch files to keep a scratch disk's purge from them."""
    file = OpenBeton(copy)
    file.check_unchanged()
    os.utime(copy)
    file.check_unchanged()
    file.check_unchanged()
    assert len(caplog.messages) == 1 and "touched while it is read" in caplog.messages[0]


def test_a_file_replaced_by_a_rename_is_read_on(copy: Path) -> None:
    file = OpenBeton(copy)
    before = file.read(3)
    other = copy.with_name("other")
    other.write_bytes(b"another")
    other.replace(copy)
    file.check_unchanged()
    assert np.array_equal(file.read(3), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_that_fails_is_named_with_its_error(
    copy: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code says that the same command may succeed later."""

    def fails(descriptor: int, buffers: object, offset: int) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    loader = open_train(copy, backend)
    monkeypatch.setattr(os, "preadv", fails)
    if backend == "ffcv":  # its own reads fail on a descriptor that is none
        monkeypatch.setattr(loader.data, "descriptors_N", np.full(45, -1, np.int32))
    with closing(loader), pytest.raises(OSError, match=copy.name) as failure:
        next(loader.starting_at(Position()))
    assert failure.value.errno == errno.ESTALE


def test_a_file_without_a_manifest_is_known_without_reading_it_all(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_beton, "sha256_of", None)
    identity = OpenBeton(copy).info.identity
    data, table = copy.read_bytes(), OpenBeton(copy).table
    end = int(table.offsets[-1] + table.sizes[-1])
    overwrite(copy, data[: end - 1] + bytes([data[end - 1] ^ 255]) + data[end:])
    assert OpenBeton(copy).info.identity != identity
