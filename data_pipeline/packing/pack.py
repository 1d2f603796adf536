"""Images of any source -> one .beton and its manifest, both whole or neither.

The same images and settings give the same bytes, on any number of processes: the file's SHA-256
is the fingerprint of the data. Images that need no change keep their JPEG bytes
(:mod:`data_pipeline.packing.image_codec` says which, and what becomes of the others).
"""

import importlib.metadata
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL

from common.bounds import check_bounds
from common.cores import cores_alone
from common.errors import ConfigError, DataError
from common.files.atomic_file import AtomicFile, check_replaceable
from common.files.strict_json import dump_json
from common.progress import Progress
from data_pipeline.packing.beton_writer import BetonWriter
from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS
from data_pipeline.packing.image_codec import NO_LABEL, CodecConfig, Format, LeftOut, Stored
from data_pipeline.packing.pack_workers import CHUNK, Chunk, WorkerDiedError, encode_in_order
from data_pipeline.packing.sources import Share, Source, open_source, share_of
from data_pipeline.packing.targets_table import Targets, no_targets, read_targets
from data_pipeline.reading.beton import MAX_LABEL, sample_count, sha256_of
from data_pipeline.reading.jpeg import soundness_check
from data_pipeline.reading.manifest import dump_manifest, load_manifest, manifest_path

# Decoding and converting hold eight bytes a pixel: no more fit into this machine's memory.
_MAX_PIXELS = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
_WORTH_A_PROCESS = 64  # images: it takes a third of a second to start
_LISTED = 1000  # files named in the manifest for each kind of change
_NAMED = 100_000  # samples of a set whose manifest names them all: it is read at every start


@dataclass(frozen=True, kw_only=True)
class PackConfig(CodecConfig):
    """How to pack."""

    workers: int = 0
    """Processes; 0: as many as this process may use cores."""
    labels: bool = True
    """Class folders give labels; off packs all images below the folder without."""
    strict: bool = False
    """Refuse at the first image that would be left out, and files that would be passed over."""
    download: bool = False
    """Allow downloading a torchvision data set."""
    root: Path = Path("data")
    """Folder of downloaded torchvision data sets."""
    targets: Path | None = None
    """CSV file of what to predict of each image beside its class, by its path below the folder."""
    shard: str = "1/1"
    """K/N: the K-th of N shares, for as many packings side by side; all files are one set."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    """File names that count as images, lower case, with their dots."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            "--",
            max_side="[0, inf)",
            quality="[1, 100]",
            min_levels="[0, 256]",
            workers="[0, inf)",
            max_pixels=f"[1, {_MAX_PIXELS}]",
        )
        if self.format not in get_args(Format):
            raise ConfigError(f"--format {self.format}: choose auto, jpeg or raw")
        share_of(self.shard)
        if not self.extensions:
            raise ConfigError("no file extensions: name at least one")
        for extension in self.extensions:
            if not extension.startswith(".") or extension != extension.lower():
                raise ConfigError(f"extension {extension!r}: lower case, with its dot, as '.jpg'")


@dataclass(frozen=True)
class PackReport:
    """What was packed."""

    path: Path
    num_samples: int
    num_bytes: int
    fingerprint: str  # SHA-256 of the file
    class_names: tuple[str, ...]
    num_labelled: int
    fates: dict[str, int]  # how the stored images are stored -> count
    changes: dict[str, int]  # what was done to stored images -> count
    left_out: tuple[tuple[str, str], ...]  # image, reason
    passed_over: dict[str, int]  # why files of the source are not images -> count
    empty_classes: tuple[str, ...]
    seconds: float


def pack(source: str, out: Path | str, config: PackConfig, progress: bool = True) -> PackReport:
    """Pack a source into ``out`` and write ``out.json`` beside it, replacing what was there.

    Args:
        source: a folder of images, ``torchvision:NAME[:SPLIT]`` or ``embedded:NAME[:SPLIT]``; see
            :func:`data_pipeline.packing.sources.open_source`.
        out: the .beton.
        config: how.
        progress: show it on standard error.

    Raises:
        DataError: the source cannot be used, no image of it can, or with ``strict`` one cannot.
        OSError: ``out`` cannot be written.
        ChildProcessError: a packing process was killed. Nothing is left behind in any case.
    """
    start, out = time.monotonic(), Path(out)
    _check_target(out)
    images = open_source(
        source,
        root=config.root,
        download=config.download,
        labels=config.labels,
        extensions=config.extensions,
        clips=config.clips,
    )
    if config.strict and images.passed_over:
        raise _passed_over(source, images)
    is_whole = share_of(config.shard) == (1, 1)
    images = images if is_whole else Share(images, config.shard)
    table = config.targets
    targets = no_targets(len(images)) if table is None else read_targets(table, images)
    packing = _Packing(images, targets, config)
    try:
        with AtomicFile(out) as beton, AtomicFile(manifest_path(out)) as manifest:
            writer = BetonWriter(beton.file, len(images), len(targets.names))
            with Progress(f"packing {out.name}", len(images), "images", progress) as bar:
                packing.write(writer, bar)
            if not writer.num_samples:
                index, reason = min(packing.left_out.items())
                raise DataError(
                    f"{source}: none of its {len(images)} images can be used; the first, "
                    f"{images.name(index)}: {reason}"
                )
            content = writer.finish(packing.clips())
            num_bytes = beton.file.seek(0, os.SEEK_END)
            # Read back: the tables at the front are written last, so no hash could run along.
            with Progress("checksum", num_bytes, "B", progress) as bar:
                sha256 = sha256_of(beton.file, bar.advance)
            identity = {"sha256": sha256, "content_sha256": content, "bytes": num_bytes}
            manifest.file.write(dump_manifest(identity | packing.described()))
            _publish(beton, manifest, out)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error
    classes = images.class_names
    return PackReport(
        path=out,
        num_samples=writer.num_samples,
        num_bytes=num_bytes,
        fingerprint=sha256,
        class_names=classes,
        num_labelled=writer.num_samples - packing.class_counts[NO_LABEL],
        fates=dict(sorted(packing.fates.items())),
        changes=dict(sorted(packing.changes.items())),
        left_out=tuple((images.name(i), why) for i, why in sorted(packing.left_out.items())),
        passed_over={why: len(names) for why, names in sorted(images.passed_over.items())},
        empty_classes=tuple(
            c for i, c in enumerate(classes) if is_whole and not packing.class_counts[i]
        ),
        seconds=time.monotonic() - start,
    )


def _check_target(out: Path) -> None:
    """Before hours of work: can the file get its name?"""
    if out.is_dir():
        raise DataError(f"{out}: is a folder; name the file to write, such as {out / 'x.beton'}")
    if not out.parent.is_dir():
        raise DataError(f"{out}: the folder {out.parent} does not exist; make it first")
    for path in (out, manifest_path(out)):
        check_replaceable(path)
    if out.suffix == ".beton":  # ours to replace by its name, whatever became of it
        return
    load_manifest(out)
    if out.exists():
        try:
            sample_count(out)
        except DataError:
            raise DataError(f"{out}: exists and is no .beton; name another OUT.beton") from None


def _publish(beton: AtomicFile, manifest: AtomicFile, out: Path) -> None:
    """Two renames cannot be one step. Between them, the new manifest stands beside the old file,

    which whoever reads it finds out and says; the other order could lose class names unnoticed.
    """
    beton.stage()
    replaces = out.exists()
    manifest.publish()
    try:
        beton.publish()
    except BaseException:
        if not replaces:
            manifest_path(out).unlink(missing_ok=True)
        raise


class _ClipTable:
    """Which of the stored images begin clips, and how far each differs from the one before."""

    def __init__(self, starts: Sequence[int]) -> None:
        self._begins, self._clip = np.asarray(starts), -1
        self._starts: list[int] = []  # by what is stored
        self._motion: list[float] = []
        self._last = np.empty(0, np.int16)

    def add(self, index: int, thumbnail: bytes) -> None:
        """The next stored image; ``index`` is its number in the source."""
        if not len(self._begins):
            return
        grey = np.frombuffer(thumbnail, np.uint8).astype(np.int16)
        clip = int(np.searchsorted(self._begins, index, side="right"))
        if clip != self._clip:
            self._clip, self._last = clip, grey
            self._starts.append(len(self._motion))
        self._motion.append(round(float(np.abs(grey - self._last).mean()), 2))
        self._last = grey

    def described(self) -> dict[str, list[int] | list[float]]:
        return {"starts": self._starts, "motion": self._motion}


class _Packing:
    """Encodes and writes the images of a source, and keeps count of what becomes of them."""

    def __init__(self, images: Source, targets: Targets, config: PackConfig) -> None:
        self._images, self._targets, self._config = images, targets, config
        self.class_counts: Counter[int] = Counter()
        self.fates: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.left_out: dict[int, str] = {}
        self._changed: dict[str, list[str]] = {}
        self._lost: dict[str, dict[str, str]] = {}  # change -> image -> how much
        self._labels: dict[int, int] = {}  # of the images being encoded
        self._clips = _ClipTable(images.starts)

    def write(self, writer: BetonWriter, bar: Progress) -> None:
        """Write all images that can be used.

        Raises:
            DataError, ChildProcessError: as :func:`pack`.
        """
        workers = min(self._config.workers or cores_alone(), len(self._images) // _WORTH_A_PROCESS)
        workers = max(1, workers)
        names = CodecConfig.__annotations__
        codec = CodecConfig(**{name: getattr(self._config, name) for name in names})
        codec = replace(codec, clips=bool(self._images.starts))
        try:
            for index, result in encode_in_order(self._chunks(workers, bar), codec, workers):
                label = self._labels.pop(index)
                bar.advance()
                if isinstance(result, LeftOut):
                    self._leave_out(index, result)
                    continue
                writer.append(result, label, self._targets.values_NT[index])
                self.class_counts[label] += 1
                self._clips.add(index, result.thumbnail)
                self._count(index, result)
        except WorkerDiedError as error:
            raise ChildProcessError(
                f"a packing process died at {self._images.name(error.index)} ({error.how}); out of "
                "memory? Use fewer --workers, or less for --max-pixels; if it is always this "
                "image, move it away"
            ) from error

    def clips(self) -> bytes:
        """What the file's content is more than images and labels: where clips begin, and motion."""
        return dump_json(self._clips.described()).encode() if self._images.starts else b""

    def _chunks(self, workers: int, bar: Progress) -> Iterator[Chunk]:
        """Images to encode, fetched as they are asked for; notes their labels."""
        images = self._images
        size = max(1, min(CHUNK, len(images) // (4 * workers)))
        for first in range(0, len(images), size):
            chunk = []
            for index in range(first, min(first + size, len(images))):
                image, label = images.sample(index)
                if not -1 <= label <= MAX_LABEL:
                    raise DataError(f"{images.name(index)}: label {label} is out of range")
                if isinstance(image, LeftOut):
                    self._leave_out(index, image)
                    bar.advance()
                    continue
                self._labels[index] = label
                chunk.append((index, image))
            if chunk:
                yield chunk

    def _leave_out(self, index: int, left_out: LeftOut) -> None:
        if self._config.strict:
            raise DataError(
                f"{self._images.name(index)}: {left_out.reason}; mend or remove it, or pack "
                "without --strict to leave such images out"
            )
        self.left_out[index] = left_out.reason

    def _count(self, index: int, stored: Stored) -> None:
        self.fates[stored.fate] += 1
        for each in stored.changes:
            change, _, lost = each.partition(": ")
            self.changes[change] += 1
            if self.changes[change] <= _LISTED:
                self._changed.setdefault(change, []).append(self._images.name(index))
                if lost:
                    self._lost.setdefault(change, {})[self._images.name(index)] = lost

    def described(self) -> dict[str, Any]:
        """The manifest, but for the file's identity. Nothing in it depends on time or processes."""
        settings = asdict(self._config)
        # Of no effect on the result; targets lie in the file.
        for name in ("workers", "download", "root", "strict", "targets"):
            del settings[name]
        images, counts, classes = self._images, self.class_counts, self._images.class_names
        names = sorted(self.left_out.items())
        kept = [index for index in range(len(images)) if index not in self.left_out]
        are_files = images.description.get("kind") in ("folder", "tar") and len(kept) <= _NAMED
        return {
            "count": sum(counts.values()),
            "unlabelled": counts[-1],
            "classes": list(classes),
            **({"targets": list(self._targets.names)} if self._targets.names else {}),
            "class_counts": [counts[label] for label in range(len(classes))],
            "source": images.description,
            "settings": settings,
            "fates": dict(sorted(self.fates.items())) | {"left out": len(names)},
            "left_out": [{"image": images.name(i), "reason": reason} for i, reason in names],
            "changed": {
                change: {"count": self.changes[change], f"first_{_LISTED}": self._changed[change]}
                | ({"lost": self._lost[change]} if change in self._lost else {})
                for change in sorted(self.changes)
            },
            "passed_over": {
                why: {"count": len(names), f"first_{_LISTED}": names[:_LISTED]}
                for why, names in sorted(images.passed_over.items())
            },
            **({"images": [images.name(index) for index in kept]} if are_files else {}),
            **({"clips": self._clips.described()} if images.starts else {}),
            "versions": {
                "widebatch": importlib.metadata.version("widebatch"),
                "python": platform.python_version(),
                "pillow": PIL.__version__,
                "numpy": np.__version__,
                "jpegs_checked_by": soundness_check()[0],
            },
        }


def _passed_over(source: str, images: Source) -> DataError:
    why, names = min(images.passed_over.items())
    count = sum(map(len, images.passed_over.values()))
    return DataError(
        f"{source}: {count} of its files and folders would be passed over, such as {names[0]} "
        f"({why}); move them away, name image files with --extensions, or pack without --strict"
    )
