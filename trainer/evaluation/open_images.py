"""Images as they lie, a folder or files: packed on the way, into a temporary file.

So they are decoded, cut and refused exactly as training images are.
"""

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from common.errors import ConfigError
from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.open_data import OpenData


class OpenImages(NamedTuple):
    """A set of images, there as long as the block of :func:`open_images`."""

    data: OpenData
    names: list[str] | None
    """Their files, where they were named one by one; else the set's manifests have them."""
    left_out: list[tuple[str, str]]
    """Files that cannot be used, each with its reason."""
    passed_over: dict[str, int]
    """Files that are no images of the set, by the reason."""


def are_packed(given: Sequence[Path]) -> bool:
    """Whether all are .beton files."""
    return all(path.suffix == ".beton" for path in given)


@contextlib.contextmanager
def open_images(
    given: Sequence[Path], option: str, *, workers: int = 1, progress: bool = False
) -> Iterator[OpenImages]:
    """Open .beton files; or pack one folder (with one sub-folder per class, or without), one tar
    file, or image files, into the folder for temporary files (TMPDIR).

    Args:
        given: one or more.
        option: that names them, for messages.
        workers: processes that pack; 0: as many as there are cores.
        progress: show it on standard error.

    Raises:
        ConfigError: ``given`` mixes kinds, or names what is not there or no image; tells
            ``option``.
        DataError: no image can be used.
    """
    if are_packed(given):
        yield OpenImages(OpenData(given), None, [], {})
        return
    with _ending_on_signals(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one_by_one = len(given) > 1 or not (given[0].is_dir() or given[0].suffix == ".tar")
        source = _linked(given, folder, option) if one_by_one else _there(given[0], option)
        out = folder / "images.beton"
        report = pack(str(source), out, PackConfig(workers=workers), progress=progress)
        of_link = {path.name: path for path in source.iterdir()} if one_by_one else {}
        below = source if source.is_dir() else source.parent  # a tar's images are called by it
        left_out = [
            (str(of_link.get(name, below / name).resolve()), why) for name, why in report.left_out
        ]
        gone = {name for name, _ in report.left_out}
        names = [str(path) for number, path in enumerate(given) if _link(number, path) not in gone]
        yield OpenImages(OpenData(out), names if one_by_one else None, left_out, report.passed_over)


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """A scheduler's signals take away what is packed, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _there(path: Path, option: str) -> Path:
    if not path.exists():
        raise ConfigError(f"{option} {path}: no such file or folder")
    return path


def _link(number: int, path: Path) -> str:
    """Numbered: packing orders by name, and images keep the order that they are given in."""
    return f"{number:09d}{path.suffix.lower()}"


def _linked(given: Sequence[Path], folder: Path, option: str) -> Path:
    source = folder / "images"
    source.mkdir()
    for number, path in enumerate(given):
        if _there(path, option).is_dir() or path.suffix.lower() not in IMAGE_EXTENSIONS:
            raise ConfigError(
                f"{option} {path}: name .beton files, one folder, one .tar, or image files "
                f"({' '.join(IMAGE_EXTENSIONS)})"
            )
        (source / _link(number, path)).symlink_to(path.resolve())
    return source
