"""Where images come from: folders, torchvision's data sets, arrays that ship with the product.

What a source passes over (hidden files, other files) it lists: nothing is lost in silence.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.packing.image_codec import NO_LABEL, Sample

# torchvision's ImageFolder takes these, so sample ids and labels agree with it.
IMAGE_EXTENSIONS = (*(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),)
# What systems leave in folders of images, beside what begins with a dot and so is hidden anyway.
# Casefolded: they come back from file systems that do not tell upper case from lower.
_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "recycled", "__macosx"}
    | {"#snapshot", "@recently-snapshot", "@__thumb", "thumbs", "__pycache__", "lost+found"}
    | {"lost.dir", "network trash folder", "temporary items", "system volume information"}
    | {f"found.{number:03}" for number in range(1000)}
)
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class Source(Protocol):
    """A numbered set of images, which names them for reports and hands out each with its label."""

    description: dict[str, str]
    class_names: tuple[str, ...]
    passed_over: dict[str, list[str]]  # why -> names

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a report."""
        ...

    def sample(self, index: int) -> Sample:
        """An image and its label."""
        ...


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
        return _open_embedded(rest)
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
        raise DataError(
            f"{source}: neither a folder nor the name of a torchvision data set"
            f"{torchvision_source.similar(name)}"
        )
    return torchvision_source.open_torchvision(name, root=root, download=download)


# Of a folder and all above it: one that is its own ancestor, by a link, would go on for ever.
_Identities = frozenset[tuple[int, int]]


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
        self._paths: list[str] = []  # relative to the folder, in order
        self._labels: list[int] = []
        self.class_names: tuple[str, ...] = ()
        self.passed_over: dict[str, list[str]] = {}
        self.description = {"kind": "folder", "path": self._folder}
        self._find(labels)
        for names in self.passed_over.values():
            names.sort()
        if not self._paths:
            raise DataError(
                f"{folder}: no image files ({' '.join(self._extensions)}) in it or its class "
                f"folders; --extensions names others"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file's path below the folder."""
        return self._paths[index]

    def sample(self, index: int) -> Sample:
        """The file's path and its class."""
        return Sample(f"{self._folder}/{self._paths[index]}", self._labels[index])

    def _find(self, labels: bool) -> None:
        root = Path(self._folder)
        above = frozenset(_identity(folder.stat()) for folder in (root, *root.parents))
        if not labels:
            self._take_below("", above)
            self._labels = [NO_LABEL] * len(self._paths)
            return
        folders, files = self._list("", above)
        for label, (name, ancestors) in enumerate(folders.items()):
            self._take_below(name, ancestors)
            self._labels += [label] * (len(self._paths) - len(self._labels))
        in_classes = len(self._paths)
        self._take(files)
        if not in_classes:
            self._labels = [NO_LABEL] * len(self._paths)
            return
        for path in self._paths[in_classes:]:
            self._pass_over("outside the class folders", path)
        del self._paths[in_classes:]
        self.class_names = tuple(folders)
        if {name.lower() for name in folders} <= _SPLITS:
            first = self.class_names[0]
            raise DataError(
                f"{self._folder}: its folders {', '.join(folders)} are splits, not classes; pack "
                f"them one by one (as {self._folder}/{first}), or all of them "
                "without labels (--no-labels)"
            )

    def _take_below(self, top: str, above: _Identities) -> None:
        """All image files below ``top``, ordered by folder and then by name, as ImageFolder."""
        files: dict[str, list[str]] = {}
        stack = [(top, above)]
        while stack:
            folder, above = stack.pop()
            below, files[folder] = self._list(folder, above)
            stack += below.items()
        for folder in sorted(files):
            self._take(files[folder])

    def _list(self, folder: str, above: _Identities) -> tuple[dict[str, _Identities], list[str]]:
        """Sub-folders, each with itself and all above it, and files, by their paths, in order."""
        folders: dict[str, _Identities] = {}
        files: list[str] = []
        try:
            entries = sorted(os.scandir(f"{self._folder}/{folder}"), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"cannot be listed: {error.strerror}"
            if not folder:
                raise DataError(f"{self._folder}: {reason}; check its mode") from error
            self._pass_over(reason, folder)
            return folders, files
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if not entry.is_dir():
                    files.append(path)
                elif why := _no_class(entry.name):
                    self._pass_over(why, path)
                elif (identity := _identity(entry.stat())) in above:
                    self._pass_over("link to a folder above it", path)
                else:
                    folders[path] = above | {identity}
            except OSError as error:  # a link to itself, or through a closed folder
                self._pass_over(error.strerror or str(error), path)
        return folders, files

    def _take(self, files: Sequence[str]) -> None:
        for path in files:
            name = path.rpartition("/")[2]
            if name.startswith("."):
                self._pass_over("hidden", path)
            elif name.lower().endswith(self._extensions):
                self._paths.append(path)
            else:
                extension = Path(name).suffix.lower() or "no extension"
                self._pass_over(f"not an image file ({extension})", path)

    def _pass_over(self, why: str, path: str) -> None:
        self.passed_over.setdefault(why, []).append(path)


def _no_class(folder: str) -> str | None:
    """Why a folder of this name holds nobody's images, or None."""
    if folder.casefold() in _SYSTEM_FOLDERS:
        return "folder of the system's"
    return "hidden" if folder.startswith(".") else None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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


def _open_embedded(name: str) -> ArraySource:
    """The images that ship with the product, ``NAME[:train|test]``."""
    from data_pipeline.packing import embedded

    base, _, split = name.partition(":")
    if base != embedded.NAME or split not in ("", "train", "test"):
        raise DataError(
            f"embedded:{name}: there is embedded:{embedded.NAME}:train and "
            f"embedded:{embedded.NAME}:test"
        )
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    return ArraySource(
        *embedded.embedded_images(part), {"kind": "embedded", "name": base, "split": part}
    )
