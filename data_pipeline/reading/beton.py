"""Is this .beton safe to map? Checks before FFCV sees it, and the format's layout.

FFCV trusts every number in a file: a wrong pointer shows other samples' pixels, a wrong count asks
for terabytes, an unfinished file aborts the process. :func:`read_beton` therefore proves the
tables of a file before anything maps it. It reads the tables only, never image data, and does not
import FFCV.

What is wrong with the file as a whole (header, fields, counts) is always refused. What is wrong
with one sample (its pointer, size, dimensions or label) is refused too, unless the caller allows so
many damaged samples; then it is listed, its table entry is emptied, and no reader ever follows its
pointers.

Layout of version 2, little-endian, as FFCV 1.0.2 reads it (tests compare the types with FFCV's)::

    HEADER | FIELD x fields | metadata x samples | image data ... | ALLOCATION x samples | end

Files of ``widebatch pack`` say in the spare bytes of the image field what their images hash to
(:data:`SIGNATURE`), so that a manifest beside the wrong file is noticed without reading the file.
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.files.regular_file import open_regular
from data_pipeline.reading.damage import Damage
from data_pipeline.reading.manifest import ManifestHead, read_manifest

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])

FLOAT_FIELD, INT_FIELD, IMAGE_FIELD = 0, 1, 2
# Fields of fixed size only: the others parse their own arguments and point elsewhere in the file.
FIELD_TYPES = {FLOAT_FIELD: np.dtype("<f8"), INT_FIELD: np.dtype("<i8"), IMAGE_FIELD: IMAGE}

JPEG_MODE, RAW_MODE = 0, 1
MIN_PAGE_SIZE = 1 << 21  # bytes; FFCV's own bounds
MAX_FIELDS = 64
MAX_TARGETS = MAX_FIELDS - 2  # beside image and label
MAX_PIXELS = 1 << 26  # 64 megapixels, 192 MiB decoded: what a decoding thread may have to hold
MAX_LABEL = (1 << 31) - 1
SIGNATURE = b"widebatch/1\0"  # then the 32 bytes of the content digest, in the image's arguments

_LONG_TO_READ = 1 << 30  # bytes: seconds, where the disk is slow
_IDENTIFYING = 64  # images, evenly over a file
_IDENTIFYING_BYTES = 1 << 16  # of each

REMEDY = "pack it again with 'widebatch pack'"


@dataclass(frozen=True)
class DataInfo:
    """What a checked file holds, or several that are one set."""

    paths: tuple[Path, ...]
    num_samples: int
    num_labelled: int  # samples with a label; the others say -1
    class_names: tuple[str, ...]  # empty where the manifest is missing or names none
    fingerprint: str  # SHA-256 of the content, hexadecimal; empty where no manifest says it
    identity: str  # see SampleTable
    identities: tuple[str, ...]  # of each file
    target_names: tuple[str, ...] = ()  # of numbers to predict, beside the label
    num_damaged: int = 0  # samples whose tables are; more may turn out not to decode

    @property
    def name(self) -> str:
        """Of the files, for messages."""
        return name_of(self.paths)

    @property
    def has_label(self) -> bool:
        """Whether every sound sample has a label."""
        return self.num_labelled == self.num_samples - self.num_damaged


@dataclass(frozen=True)
class SampleTable:
    """Where the samples of a checked file lie; arrays of length N, in the order of sample ids."""

    modes: npt.NDArray[np.uint8]  # JPEG_MODE or RAW_MODE (height x width x 3 bytes of RGB)
    heights: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]  # bytes from the start of the file
    sizes: npt.NDArray[np.int64]  # bytes
    labels: npt.NDArray[np.int64]  # -1: no label
    targets: npt.NDArray[np.float64]  # (N, T); NaN: unknown
    # SHA-256 of header, tables and some images: tells files apart without reading 140 GB.
    identity: str
    # Sample id -> what is wrong with it. Its entries above are an empty JPEG of one pixel.
    damaged: Mapping[int, str] = field(default_factory=dict)


def name_of(paths: Sequence[Path]) -> str:
    """Files for a message: the first one, and how many there are besides."""
    more = len(paths) - 1
    return f"{paths[0]} and {more} more" if more else str(paths[0])


def sample_count(path: Path | str) -> int:
    """Samples that the header of a .beton claims, in no time: for a first look at a command.

    Raises:
        DataError: there is no such file, or it is no .beton.
    """
    path = Path(path)
    with opened(path) as file:
        return _read_layout(path, file).num_samples


def read_beton(path: Path, file: BinaryIO, max_damaged: float = 0) -> tuple[DataInfo, SampleTable]:
    """Prove that every pointer and size in a .beton lies inside it and that its tables agree.

    Args:
        path: the file. The manifest beside it (``PATH.json``), where there is one, must be its own.
        file: the same, open.
        max_damaged: samples that may be damaged in the tables; below 1 a fraction of all.

    Raises:
        DataError: the file or its manifest cannot be used; names the sample where there is one.
    """
    table, signature, fields = _read_table(path, file, max_damaged)
    manifest = read_manifest(path)
    if manifest is not None:
        _check_manifest(path, file, manifest, table, signature)
    info = DataInfo(
        paths=(path,),
        num_samples=len(table.labels),
        num_labelled=int((table.labels >= 0).sum()),
        class_names=manifest.class_names if manifest else (),
        fingerprint=manifest.sha256 if manifest else "",
        identity=table.identity,
        identities=(table.identity,),
        target_names=(manifest.target_names if manifest else ()) or fields,
        num_damaged=len(table.damaged),
    )
    return info, table


def sha256_of(file: BinaryIO, advance: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a whole open file, hexadecimal.

    Args:
        file: a regular file.
        advance: hears of bytes as they are read; by default rank 0 shows how far a long one is.
    """
    if advance is None:
        from common.progress import Progress

        size = os.fstat(file.fileno()).st_size
        shown = size >= _LONG_TO_READ and os.environ.get("RANK", "0") == "0"
        with Progress("checking the data's content", size, "B", shown) as bar:
            return sha256_of(file, bar.advance)
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    file.seek(0)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(memoryview(buffer)[:count])
        advance(count)
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open; what the operating system refuses becomes a DataError."""
    if path.is_dir():
        words = ("widebatch", "pack", str(path), f"{path.resolve().name}.beton")
        raise DataError(f"{path}: is a folder; pack it first: {shlex.join(words)}")
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with 'widebatch pack SRC {path}'") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_array(path: Path, file: BinaryIO, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    """``count`` records; the caller has compared the count with the size of the file."""
    file.seek(offset)
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{path}: ends early; copy it again or {REMEDY}")
    return np.frombuffer(data, dtype)


@dataclass(frozen=True)
class _Layout:
    """Where the tables of a file lie; its header has been found possible."""

    num_samples: int
    page_size: int  # bytes
    fields: np.ndarray
    columns: dict[str, str]
    metadata: np.dtype
    metadata_start: int
    data_start: int
    tail: int  # of the allocation table


def _read_layout(path: Path, file: BinaryIO) -> _Layout:
    """The header and what follows from it. Counts are compared with the file's size first."""
    size = os.fstat(file.fileno()).st_size
    if size < HEADER.itemsize:
        raise DataError(f"{path}: {size} bytes are no .beton; {REMEDY}")
    header = _read_array(path, file, 0, HEADER, 1)[0]
    if header["version"] != VERSION:
        raise DataError(f"{path}: not a .beton of version {VERSION}; {REMEDY}")
    num_fields, page_size = int(header["num_fields"]), int(header["page_size"])
    if not 1 <= num_fields <= MAX_FIELDS or HEADER.itemsize + num_fields * FIELD.itemsize > size:
        raise DataError(f"{path}: the header claims {num_fields} fields; {REMEDY}")
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise DataError(f"{path}: the header claims pages of {page_size} bytes; {REMEDY}")

    fields = _read_array(path, file, HEADER.itemsize, FIELD, num_fields)
    columns = _column_of_field(path, fields)
    metadata_dtype = np.dtype([("", FIELD_TYPES[int(t)]) for t in fields["type_id"]], align=True)

    # Counts come before reads: nothing is allocated for samples that the file has no room for.
    num_samples, tail = int(header["num_samples"]), int(header["alloc_table_ptr"])
    metadata_start = HEADER.itemsize + num_fields * FIELD.itemsize
    data_start = metadata_start + num_samples * metadata_dtype.itemsize
    if num_samples == 0:
        raise DataError(f"{path}: holds no samples; {REMEDY}")
    if data_start >= size or tail + num_samples * ALLOCATION.itemsize != size or tail < data_start:
        raise DataError(
            f"{path}: unfinished or cut short: {num_samples} samples do not fit its {size} bytes; "
            f"copy it again or {REMEDY}"
        )
    layout = (num_samples, page_size, fields, columns)
    return _Layout(*layout, metadata_dtype, metadata_start, data_start, tail)


def _read_table(
    path: Path, file: BinaryIO, max_damaged: float
) -> tuple[SampleTable, bytes | None, tuple[str, ...]]:
    """The checked table, the content digest of a file of ``widebatch pack``, and the names of the
    fields with targets."""
    layout = _read_layout(path, file)
    count = layout.num_samples
    metadata = _read_array(path, file, layout.metadata_start, layout.metadata, count)
    allocations = _read_array(path, file, layout.tail, ALLOCATION, count)

    damage = Damage(str(path), count, max_damaged)
    images = metadata[layout.columns["image"]]
    offsets, sizes = _check_allocations(allocations, layout, damage)
    _check_images(images, offsets, sizes, damage)
    labels = np.full(count, -1, np.int64)
    if "label" in layout.columns:
        labels = metadata[layout.columns["label"]].astype(np.int64)
    damage.mark((labels < -1) | (labels > MAX_LABEL), "has an impossible label")
    of_targets = tuple(
        name
        for name, kind in zip(layout.columns, layout.fields["type_id"])
        if int(kind) == FLOAT_FIELD
    )
    targets = np.empty((count, len(of_targets)))
    for number, name in enumerate(of_targets):
        targets[:, number] = metadata[layout.columns[name]]
    _check_overlaps(offsets, sizes, damage)
    sound_N = damage.sound()
    if not sound_N.any():
        raise DataError(f"{path}: all of its {count} samples are damaged; {REMEDY}")

    def where_sound(column: np.ndarray, otherwise: int) -> npt.NDArray[np.int64]:
        return np.where(sound_N, column, column.dtype.type(otherwise)).astype(np.int64)

    offsets_N, sizes_N = where_sound(offsets, layout.data_start), where_sound(sizes, 0)
    table = SampleTable(
        modes=np.where(sound_N, images["mode"], np.uint8(JPEG_MODE)),
        heights=where_sound(images["height"], 1),
        widths=where_sound(images["width"], 1),
        offsets=offsets_N,
        sizes=sizes_N,
        labels=where_sound(labels, -1),
        targets=np.where(sound_N[:, None] & np.isfinite(targets), targets, np.nan),
        identity=_identity(file, (layout.fields, metadata, allocations), offsets_N, sizes_N),
        damaged=damage.reasons,
    )
    return table, _content_digest(layout.fields, layout.columns["image"]), of_targets


def _identity(
    file: BinaryIO,
    tables: tuple[np.ndarray, ...],
    offsets_N: npt.NDArray[np.int64],
    sizes_N: npt.NDArray[np.int64],
) -> str:
    """See :class:`SampleTable`: a file may have the tables of another, raw pixels mostly do."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update(table.tobytes())
    last = len(sizes_N) - 1
    for sample in np.unique(np.linspace(0, last, _IDENTIFYING).astype(np.int64)):
        file.seek(int(offsets_N[sample]))
        digest.update(file.read(min(int(sizes_N[sample]), _IDENTIFYING_BYTES)))
    return digest.hexdigest()


def _column_of_field(path: Path, fields: np.ndarray) -> dict[str, str]:
    """Field names to the names NumPy gives the metadata's columns: f0, f1, ..."""
    columns: dict[str, str] = {}
    for number, described in enumerate(fields):
        text = described["name"].tobytes()
        name = text.split(b"\0")[0].decode("ascii", "replace")
        # FFCV's reader wants ASCII after the name's end too.
        usable = name.isidentifier() and text.isascii() and name not in columns
        if not usable or int(described["type_id"]) not in FIELD_TYPES:
            raise DataError(
                f"{path}: field {number} ({name!r}) has a type or name that is not supported: an "
                f"RGB image 'image' and an integer 'label' are; {REMEDY}"
            )
        columns[name] = f"f{number}"
    wanted = {"image": IMAGE_FIELD, "label": INT_FIELD}
    types = dict(zip(columns, fields["type_id"]))
    images = sum(int(t) == IMAGE_FIELD for t in types.values())
    wrong = any(types.get(name, kind) != kind for name, kind in wanted.items())
    if images != 1 or wrong or "image" not in columns:
        raise DataError(f"{path}: needs exactly one image field, named 'image'; {REMEDY}")
    return columns


def _content_digest(fields: np.ndarray, image_column: str) -> bytes | None:
    arguments = fields[int(image_column[1:])]["arguments"].tobytes()
    if not arguments.startswith(SIGNATURE):
        return None
    return arguments[len(SIGNATURE) : len(SIGNATURE) + hashlib.sha256().digest_size]


def _check_allocations(
    allocations: np.ndarray, layout: _Layout, damage: Damage
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Offsets and sizes in the order of sample ids: inside the image data, and in one page."""
    count = layout.num_samples
    known = np.flatnonzero(allocations["sample_id"] < np.uint64(count))
    ids = allocations["sample_id"][known].astype(np.int64)
    damage.mark(np.bincount(ids, minlength=count) != 1, "has not exactly one image")
    of_sample = np.zeros(count, np.int64)
    of_sample[ids] = known
    offsets, sizes = allocations["ptr"][of_sample], allocations["size"][of_sample]

    first, last = np.uint64(layout.data_start), np.uint64(layout.tail)
    # No sum before both parts are known to be small: uint64 wraps.
    room = last - np.minimum(offsets, last)
    outside = (offsets < first) | (sizes > room)
    damage.mark(outside, "points past the end of the file")
    damage.mark(sizes == 0, "has no image data")
    shift = np.uint64(layout.page_size.bit_length() - 1)
    inside = ~outside & (sizes > 0)
    final = offsets[inside] + sizes[inside] - np.uint64(1)
    across = np.zeros(count, bool)
    across[inside] = offsets[inside] >> shift != final >> shift
    damage.mark(across, "lies across a page's end")
    return offsets, sizes


def _check_overlaps(
    offsets: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64], damage: Damage
) -> None:
    """Bytes belong to one sample. Of two that share some nobody knows whose they are: both go."""
    sound = np.flatnonzero(damage.sound())
    order = sound[np.argsort(offsets[sound], kind="stable")]
    ends = np.maximum.accumulate(offsets[order] + sizes[order])  # the furthest so far
    overlaps = np.zeros(len(offsets), bool)
    later = np.flatnonzero(ends[:-1] > offsets[order[1:]]) + 1
    overlaps[order[later]] = overlaps[order[later - 1]] = True
    damage.mark(overlaps, "overlaps another sample")


def _check_images(
    images: np.ndarray,
    offsets: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.uint64],
    damage: Damage,
) -> None:
    damage.mark(images["data_ptr"] != offsets, "points at data that is not its own")
    damage.mark(images["mode"] > RAW_MODE, "is stored in an unknown way")
    pixels = images["height"].astype(np.uint64) * images["width"].astype(np.uint64)
    damage.mark(pixels == 0, "has an empty image")
    damage.mark(pixels > MAX_PIXELS, f"has more than {MAX_PIXELS} pixels")
    raw = images["mode"] == RAW_MODE
    damage.mark(raw & (sizes != pixels * np.uint64(3)), "has a size unlike its dimensions")


def _check_manifest(
    path: Path,
    file: BinaryIO,
    manifest: ManifestHead,
    table: SampleTable,
    content_digest: bytes | None,
) -> None:
    """The manifest must have been written for this very file."""
    size = os.fstat(file.fileno()).st_size
    same = manifest.num_samples == len(table.labels) and manifest.num_bytes == size
    if not same or content_digest is None or manifest.content != content_digest.hex():
        raise DataError(
            f"{manifest.path}: describes another file than {path.name} (an interrupted packing or "
            f"copy?); {REMEDY}, or delete the manifest to go on without class names"
        )
    if manifest.target_names and len(manifest.target_names) != table.targets.shape[1]:
        raise DataError(f"{manifest.path}: names other targets than {path.name} has; {REMEDY}")
    if manifest.class_names:
        unnamed = np.flatnonzero(table.labels >= len(manifest.class_names))
        if unnamed.size:
            raise DataError(f"{path}: sample {unnamed[0]} has a label without a class; {REMEDY}")
