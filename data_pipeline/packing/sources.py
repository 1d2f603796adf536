"""Where images come from: folders, torchvision's data sets, arrays that ship with the product."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, DataError
from data_pipeline.packing.clip_source import ClipSource
from data_pipeline.packing.folder_source import FolderSource, why_no_class
from data_pipeline.packing.image_codec import Sample
from data_pipeline.packing.tar_source import TarSource


class Source(Protocol):
    """A numbered set of images, which names them for reports and hands out each with its label."""

    description: dict[str, str]
    class_names: tuple[str, ...]
    passed_over: dict[str, list[str]]  # why -> names
    starts: Sequence[int]  # of frames: where each clip begins; empty: there are no clips

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a report."""
        ...

    def sample(self, index: int) -> Sample:
        """An image and its label."""
        ...


def open_source(
    source: str,
    *,
    root: Path,
    download: bool,
    labels: bool,
    extensions: Sequence[str],
    clips: bool = False,
) -> Source:
    """The source that a name stands for.

    Args:
        source: a folder, of images or tar files, a tar file, ``torchvision:NAME[:SPLIT]``,
            ``embedded:NAME[:SPLIT]``, or the bare name
            of a torchvision set where no such folder exists.
        root: where torchvision's sets lie or are downloaded to.
        download: allow that.
        labels: class folders are classes; else all images below the folder, without labels.
        extensions: of image files, lower case, with their dots.
        clips: of a folder, images are frames of clips, and there may be videos.

    Raises:
        DataError: there is no such source, or it holds no images.
    """
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        found = _open_embedded(rest)
        if clips and not found.starts:
            raise DataError(f"{source}: no clips; embedded:moving-digits has some")
        return found
    folder = Path(source)
    tars, beside = ([], []) if kind == "torchvision" or clips else _tars(folder, extensions)
    if tars:
        return TarSource(tars, labels=labels, extensions=extensions, beside=beside)
    if folder.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tar.bz2")):
        raise DataError(f"{source}: a compressed tar; unpack it to a .tar, or to a folder")
    if kind != "torchvision" and folder.exists():
        kind_of = ClipSource if clips else FolderSource
        return kind_of(folder, labels=labels, extensions=extensions)
    if kind != "torchvision" and len(folder.parts) > 1:
        beside = [f.name for f in folder.parent.glob("*") if f.is_dir()]
        near = difflib.get_close_matches(folder.name, beside, n=3)
        hint = (
            f"; did you mean {' or '.join(str(folder.parent / n) for n in near)}?" if near else ""
        )
        raise DataError(f"{source}: no such folder{hint}")

    if clips:
        raise DataError(f"{source}: --clips is for folders of frames or videos")

    from data_pipeline.packing import torchvision_source

    name = rest if kind == "torchvision" else source
    if kind != "torchvision" and not torchvision_source.is_known(name):
        raise DataError(
            f"{source}: neither a folder nor the name of a torchvision data set"
            f"{torchvision_source.similar(name)}"
        )
    return torchvision_source.open_torchvision(name, root=root, download=download)


def _tars(path: Path, extensions: Sequence[str]) -> tuple[list[Path], list[str]]:
    """A tar file, or those of a folder that holds neither folders nor images beside them; and the
    names of what else it holds."""
    if path.suffix == ".tar" and path.is_file():
        return [path], []
    may_look = path.is_dir() and os.access(path, os.R_OK | os.X_OK)
    beside = [each for each in path.iterdir() if not why_no_class(each.name)] if may_look else []
    tars = sorted(each for each in beside if each.suffix == ".tar")
    others = sorted(each for each in beside if each.suffix != ".tar")
    if any(each.name.lower().endswith(tuple(extensions)) or each.is_dir() for each in others):
        return [], []
    return tars, [each.name for each in others]


class Share:
    """A share of a source: neighbours, in whole clips. Names and classes are those of all."""

    def __init__(self, whole: Source, share: str) -> None:
        number, shares = share_of(share)
        begins = [*(whole.starts or range(len(whole))), len(whole)]
        if shares >= len(begins):
            what = "clips" if whole.starts else "images"
            raise DataError(
                f"--shard {share}: there are {len(begins) - 1} {what} alone: take fewer"
            )
        self._whole = whole
        self._first, self._end = (
            begins[(len(begins) - 1) * n // shares] for n in (number - 1, number)
        )
        self.description, self.class_names = whole.description, whole.class_names
        self.passed_over = whole.passed_over
        own = range(self._first, self._end)
        self.starts: Sequence[int] = [start - self._first for start in whole.starts if start in own]

    def __len__(self) -> int:
        return self._end - self._first

    def name(self, index: int) -> str:
        """As in the whole."""
        return self._whole.name(self._first + index)

    def sample(self, index: int) -> Sample:
        """As in the whole."""
        return self._whole.sample(self._first + index)


def share_of(text: str) -> tuple[int, int]:
    """``"3/8"``: the third of eight.

    Raises:
        ConfigError: it is nothing like that.
    """
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, shares = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= shares:
        raise ConfigError(f"--shard {text[:40]}: write K/N, such as 1/8 to 8/8")
    return number, shares


class ArraySource:
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3), int64 labels (N,)."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        class_names: Sequence[str],
        description: dict[str, str],
        starts: Sequence[int] = (),
    ) -> None:
        self._images, self._labels = images, labels
        self.starts = starts
        self.class_names = tuple(class_names)
        self.description = description
        self.passed_over: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The number of the image."""
        return f"#{index}"

    def sample(self, index: int) -> Sample:
        """The pixels and the label."""
        return Sample(self._images[index], int(self._labels[index]))


def _open_embedded(name: str) -> ArraySource:
    """What ships with the product, ``NAME[:train|test]``."""
    from data_pipeline.packing import embedded

    base, _, split = name.partition(":")
    if base not in (embedded.NAME, embedded.CLIPS_NAME) or split not in ("", "train", "test"):
        raise DataError(
            f"embedded:{name}: there are embedded:{embedded.NAME} and"
            f" embedded:{embedded.CLIPS_NAME}, each with :train and :test"
        )
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    description = {"kind": "embedded", "name": base, "split": part}
    if base == embedded.NAME:
        return ArraySource(*embedded.embedded_images(part), description)
    images, labels, classes = embedded.embedded_clips(part)
    starts = range(0, len(images), embedded.FRAMES)
    return ArraySource(images, labels, classes, description, starts)
