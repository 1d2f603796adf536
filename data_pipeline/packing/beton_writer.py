"""Writes the .beton format: one writer, one order, one result.

The format is that of :mod:`data_pipeline.reading.beton`.

FFCV's own writer lets its processes race for pages, so that no two runs write the same bytes, and
hangs when one of them fails. Here images arrive in the order of their ids and land one after the
other: the same images give the same file, whose checksum is then the data's fingerprint.
"""

import hashlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from data_pipeline.packing.image_codec import Stored
from data_pipeline.reading.beton import (
    ALLOCATION,
    FIELD,
    FIELD_TYPES,
    FLOAT_FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    SIGNATURE,
    VERSION,
)

_FIELDS = (("image", IMAGE_FIELD), ("label", INT_FIELD))
PAGE_SIZE = 1 << 23  # bytes; FFCV's default
_ALIGNMENT = 64  # bytes; a cache line


def metadata_type(fields: Sequence[tuple[str, int]]) -> np.dtype:
    """Of a sample's entry, as FFCV has it."""
    return np.dtype([("", FIELD_TYPES[kind]) for _, kind in fields], align=True)


METADATA = metadata_type(_FIELDS)


class BetonWriter:
    """Writes samples in the order of their ids; :meth:`finish` completes the file.

    Args:
        file: open for writing, empty, seekable.
        capacity: upper bound of the number of samples, for which room is kept at the front.
        targets: numbers of each sample beside its label.
    """

    def __init__(self, file: BinaryIO, capacity: int, targets: int = 0) -> None:
        self._file = file
        self._fields = (*_FIELDS, *((f"target{n}", FLOAT_FIELD) for n in range(targets)))
        self._metadata = np.zeros(capacity, metadata_type(self._fields))
        self._allocations = np.zeros(capacity, ALLOCATION)
        self._content = hashlib.sha256()
        self._page_size = PAGE_SIZE
        self._end = HEADER.itemsize + len(self._fields) * FIELD.itemsize + self._metadata.nbytes
        self.num_samples = 0
        self._file.seek(self._end)

    def append(self, image: Stored, label: int, targets: Sequence[float] = ()) -> None:
        """Write the next sample. ``label`` -1 says that it has none; NaN, that a target is not
        known."""
        start, size = self._place(len(image.payload)), len(image.payload)
        if start != self._end:
            self._file.seek(start)  # leaves a hole of zeros
        self._file.write(image.payload)
        self._end = start + size
        head = (image.mode, image.width, image.height, start)
        self._metadata[self.num_samples] = (head, label, *targets)
        self._allocations[self.num_samples] = (self.num_samples, start, size)
        self.num_samples += 1
        self._content.update(image.digest)
        self._content.update(np.array([*head[:3], label], "<i8").tobytes())
        self._content.update(np.array(targets, "<f8").tobytes())

    def _place(self, size: int) -> int:
        """Where the next image starts: FFCV reads by pages, so none lies across a page's end.

        An image larger than a page gets a page of the next power of two, which becomes the file's
        page size: whatever lies inside a page also lies inside every larger, aligned one.
        """
        page = max(PAGE_SIZE, 1 << (size - 1).bit_length())
        self._page_size = max(self._page_size, page)
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if start // page != (start + size - 1) // page:
            start = -(-start // page) * page
        return start

    def finish(self, more: bytes = b"") -> str:
        """Write the tables; returns the content digest: SHA-256 over images and labels, and over
        ``more`` that belongs to them, in hex."""
        self._content.update(more)
        count = self.num_samples
        tail = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(tail)
        self._file.write(self._allocations[:count].tobytes())
        header = np.array((VERSION, len(self._fields), self._page_size, count, tail), HEADER)
        fields = np.zeros(len(self._fields), FIELD)
        for field, (name, kind) in zip(fields, self._fields):
            field["type_id"] = kind
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        signature = np.frombuffer(SIGNATURE + self._content.digest(), np.uint8)
        fields[0]["arguments"][: len(signature)] = signature
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + self._metadata[:count].tobytes())
        self._file.flush()
        return self._content.hexdigest()
