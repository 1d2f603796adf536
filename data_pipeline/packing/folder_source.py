"""Image files of a folder, ordered and labelled as torchvision's ImageFolder does.

What is passed over (hidden files, other files) is listed: nothing is lost in silence.
"""

import os
from collections.abc import Sequence
from pathlib import Path

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
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})

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
        self.starts: Sequence[int] = ()
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
        if {name.lower() for name in folders} <= SPLITS:
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
                elif why := why_no_class(entry.name):
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


def why_no_class(folder: str) -> str | None:
    """Why a folder of this name holds nobody's images, or None."""
    if folder.casefold() in _SYSTEM_FOLDERS:
        return "folder of the system's"
    return "hidden" if folder.startswith(".") else None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
