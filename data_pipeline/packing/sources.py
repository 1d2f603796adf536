"""Where images come from: folders, torchvision's data sets, arrays that ship with the product.

What a source passes over (hidden files, other files) it lists: nothing is lost in silence.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.packing.source import NO_LABEL, Sample, Source

# torchvision's ImageFolder takes these, so sample ids and labels agree with it.
IMAGE_EXTENSIONS = (*(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),)
# What systems leave in folders of images, beside what begins with a dot and so is hidden anyway.
_SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "#recycle", "#snapshot", "__MACOSX", "__pycache__", "lost+found", "Thumbs"}
    | {"$RECYCLE.BIN", "System Volume Information"}
)
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def open_source(
    source: str, *, root: Path, download: bool, labels: bool, extensions: Sequence[str]
) -> Source:
    """The source that a name stands for.

    Args:
        source: a folder, ``torchvision:NAME[:SPLIT]``, ``embedded:NAME[:SPLIT]``, or the bare name
            of a torchvision set where no such folder exists.
        root: where torchvision's sets lie or are downloaded to.
        download: allow that.
        labels: class folders are classes; else all images below the folder, without labels.
        extensions: of image files, lower case, with their dots.

    Raises:
        DataError: there is no such source, or it holds no images.
    """
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        return EmbeddedSource(rest)
    folder = Path(source)
    if kind != "torchvision" and folder.exists():
        return FolderSource(folder, labels=labels, extensions=extensions)
    if kind != "torchvision" and len(folder.parts) > 1:
        beside = [f.name for f in folder.parent.glob("*") if f.is_dir()]
        near = difflib.get_close_matches(folder.name, beside, n=3)
        hint = (
            f"; did you mean {' or '.join(str(folder.parent / n) for n in near)}?" if near else ""
        )
        raise DataError(f"{source}: no such folder{hint}")

    from data_pipeline.packing import torchvision_source

    name = rest if kind == "torchvision" else source
    if kind != "torchvision" and not torchvision_source.is_known(name):
        near = difflib.get_close_matches(name.lower(), torchvision_source.known_names(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"{source}: neither a folder nor the name of a torchvision data set{hint}")
    return torchvision_source.open_torchvision(name, root=root, download=download)


@dataclass
class _Files:
    """Image files found, in order, and what was passed over."""

    paths: list[str] = field(default_factory=list)  # relative to the folder
    labels: list[int] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, why: str, path: str) -> None:
        self.passed_over.setdefault(why, []).append(path)


class FolderSource:
    """Image files below a folder, ordered and labelled as torchvision's ImageFolder does.

    Each sub-folder is a class, the images anywhere below it its samples. A folder without image
    files in sub-folders is flat: its own files, without labels. Links are followed, loops are not.
    """

    def __init__(self, folder: Path, *, labels: bool, extensions: Sequence[str]) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: not a folder; give the folder that holds the images")
        self._folder = str(folder.resolve())
        self._extensions = tuple(extensions)
        self.class_names: tuple[str, ...] = ()
        found = self._find_classes() if labels else None
        self._found = self._find_flat(recursive=not labels) if found is None else found
        self.passed_over = self._found.passed_over
        self.description = {"kind": "folder", "path": self._folder}
        if not self._found.paths:
            raise DataError(
                f"{folder}: no image files ({' '.join(self._extensions)}) in it or its class "
                f"folders; --extensions names others"
            )

    def __len__(self) -> int:
        return len(self._found.paths)

    def name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._found.paths[index]

    def sample(self, index: int) -> Sample:
        """The file's path and its class."""
        path = f"{self._folder}/{self._found.paths[index]}"
        return Sample(path, self._found.labels[index])

    def _find_classes(self) -> _Files | None:
        """Images of class folders; None where no sub-folder holds any."""
        found = _Files()
        with _listing(self._folder) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir())
        for name in folders:
            if why := _no_class(name):
                found.pass_over(why, name)
        classes = [name for name in folders if not _no_class(name)]
        for label, name in enumerate(classes):
            self._find_below(name, found)
            found.labels += [label] * (len(found.paths) - len(found.labels))
        if not found.paths:
            return None
        if {name.lower() for name in classes} <= _SPLITS:
            raise DataError(
                f"{self._folder}: its folders {', '.join(classes)} are splits, not classes; pack "
                f"them one by one (as {self._folder}/{classes[0]}), or all of them "
                "without labels (--no-labels)"
            )
        self.class_names = tuple(classes)
        beside = self._find_flat(recursive=False)
        for why, names in beside.passed_over.items():
            found.passed_over[why] = names + found.passed_over.get(why, [])
        for path in beside.paths:
            found.pass_over("outside the class folders", path)
        return found

    def _find_flat(self, recursive: bool) -> _Files:
        found = _Files()
        if recursive:
            self._find_below("", found)
        else:
            self._take_files("", found)
        found.labels = [NO_LABEL] * len(found.paths)
        return found

    def _find_below(self, top: str, found: _Files) -> None:
        """All image files below ``top``, ordered by folder and then by name, as ImageFolder."""
        folders: list[str] = []
        # A folder that is its own ancestor, by way of a link, would go on for ever.
        stack = [(top, frozenset({self._identity(top)}))]
        while stack:
            folder, ancestors = stack.pop()
            folders.append(folder)
            with _listing(f"{self._folder}/{folder}") as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
            for name in names:
                below = _below(folder, name)
                identity = self._identity(below)
                if why := _no_class(name):
                    found.pass_over(why, below)
                elif identity in ancestors:
                    found.pass_over("link to a folder above it", below)
                else:
                    stack.append((below, ancestors | {identity}))
        for folder in sorted(folders):
            self._take_files(folder, found)
        for names in found.passed_over.values():
            names.sort()

    def _identity(self, folder: str) -> tuple[int, int]:
        status = Path(self._folder, folder).stat()
        return status.st_dev, status.st_ino

    def _take_files(self, folder: str, found: _Files) -> None:
        with _listing(f"{self._folder}/{folder}") as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
        for name in names:
            path = _below(folder, name)
            if name.startswith("."):
                found.pass_over("hidden", path)
            elif name.lower().endswith(self._extensions):
                found.paths.append(path)
            else:
                extension = Path(name).suffix.lower() or "no extension"
                found.pass_over(f"not an image file ({extension})", path)


def _no_class(folder: str) -> str | None:
    """Why a folder of this name holds nobody's images, or None."""
    if folder in _SYSTEM_FOLDERS:
        return "folder of the system's"
    return "hidden" if folder.startswith(".") else None


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _listing(folder: str) -> "os._ScandirIterator[str]":
    try:
        return os.scandir(folder)
    except OSError as error:  # os.walk would silently leave its images out
        raise DataError(f"{folder}: cannot be listed: {error.strerror}; check its mode") from error


class ArraySource:
    """Images in memory: uint8 (N, H, W) or (N, H, W, 3), int64 labels (N,)."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        class_names: Sequence[str],
        description: dict[str, str],
    ) -> None:
        self._images, self._labels = images, labels
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


class EmbeddedSource(ArraySource):
    """The images that ship with the product, ``NAME[:train|test]``."""

    def __init__(self, name: str) -> None:
        from data_pipeline.packing import embedded

        base, _, split = name.partition(":")
        if base != embedded.NAME or split not in ("", "train", "test"):
            raise DataError(
                f"embedded:{name}: there is embedded:{embedded.NAME}:train and "
                f"embedded:{embedded.NAME}:test"
            )
        part: Literal["train", "test"] = "test" if split == "test" else "train"
        images, labels, class_names = embedded.embedded_images(part)
        description = {"kind": "embedded", "name": base, "split": part}
        super().__init__(images, labels, class_names, description)
