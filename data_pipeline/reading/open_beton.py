"""A checked .beton that stays open while samples are read from it, and is watched meanwhile.

Samples are read, not mapped: what is cut off under a mapping kills the process by a bus error, and
on a network file system a moment's fault does.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.reading.beton import (
    JPEG_MODE,
    REMEDY,
    DataInfo,
    SampleTable,
    opened,
    read_beton,
    sha256_of,
)
from data_pipeline.reading.jpeg import JpegError, read_jpeg_header

log = logging.getLogger(__name__)


class OpenBeton:
    """An open file. Whoever replaces it under its name, by a rename, does not disturb its readers.

    Args:
        path: the file.
        max_damaged: as for :func:`data_pipeline.reading.beton.read_beton`.

    Attributes:
        info, table: what it holds.
        descriptor: of the file, for ``pread``.

    Raises:
        DataError: the file cannot be used.
    """

    def __init__(self, path: Path | str, max_damaged: float = 0) -> None:
        self.path, self._max_damaged = Path(path), max_damaged
        with opened(self.path) as file:
            self._file = os.fdopen(os.dup(file.fileno()), "rb")  # closed with this object
        self.descriptor = self._file.fileno()
        self._stamp = self._stamp_now()
        self.info, self.table = self._read_tables()

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        """The bytes of a sample. Safe to call from several threads.

        Raises:
            DataError: the file was cut.
            OSError: it cannot be read; names it.
        """
        data = np.empty(int(self.table.sizes[sample]), np.uint8)
        start, done = int(self.table.offsets[sample]), 0
        while done < len(data):
            with self._named_errors():
                count = os.preadv(self.descriptor, [data[done:].data], start + done)
            if not count:
                raise self._changed()
            done += count
        return data

    def verify(self) -> str:
        """Read all image data; returns the file's SHA-256, hexadecimal.

        Raises:
            DataError: it is not the manifest's, or a JPEG's own header is not as the table says.
        """
        # A JPEG that declares other dimensions than the table would decode to stale pixels.
        jpegs = np.flatnonzero((self.table.modes == JPEG_MODE) & (self.table.sizes > 0))
        for sample in jpegs.tolist():
            size = self.table.widths[sample], self.table.heights[sample]
            try:
                header = read_jpeg_header(self.read(sample).tobytes())
            except JpegError as error:
                raise DataError(
                    f"{self.path}: sample {sample} is no JPEG: {error}; {REMEDY}"
                ) from error
            if (header.width, header.height) != size:
                raise DataError(
                    f"{self.path}: sample {sample} is a JPEG of {header.width} x {header.height} "
                    f"pixels but listed as {size[0]} x {size[1]}; {REMEDY}"
                )
        content = sha256_of(self._file)
        if self.info.fingerprint not in ("", content):
            raise DataError(
                f"{self.path}: its content has changed since it was packed (SHA-256 differs from "
                f"the manifest's); copy it again or {REMEDY}"
            )
        return content

    def check_unchanged(self) -> None:
        """Notice that somebody cut the file or wrote over it; costs microseconds where nobody did.

        Raises:
            DataError: it is not the file any more that was opened.
            OSError: as for :meth:`read`.
        """
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        try:
            identity = self._read_tables()[1].identity
        except DataError:
            raise self._changed() from None
        if identity != self.table.identity:
            raise self._changed()
        log.warning("%s: touched while it is read; what it holds seems the same", self.path)
        self._stamp = stamp

    def _read_tables(self) -> tuple[DataInfo, SampleTable]:
        # A buffer of its own: another one's would show what it held before.
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            return read_beton(self.path, file, self._max_damaged)

    def _stamp_now(self) -> tuple[int, int]:
        with self._named_errors():
            status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path}: cut or written over while it was read; put it back as it was, and the"
            " same command goes on from the newest checkpoint, where there is one"
        )
