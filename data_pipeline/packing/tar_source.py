"""Images in tar files: WebDataset's shards, or folders of images in an archive.

Nothing is extracted: heads are read, and each image where it lies.
"""

import os
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common.errors import DataError
from data_pipeline.packing.folder_source import why_no_class
from data_pipeline.packing.image_codec import MAX_FILE_BYTES, NO_LABEL, LeftOut, Sample
from data_pipeline.reading.beton import MAX_LABEL

_LABEL = ".cls"
_LONGEST_LABEL = 32  # bytes
_TOO_LARGE = f"larger than {MAX_FILE_BYTES >> 30} GiB"


class _Member(NamedTuple):
    tar: int  # its number
    name: str
    offset: int
    size: int

    @property
    def key(self) -> tuple[int, str]:
        """What a sample's members have in common: the path up to the first dot of the name."""
        folder, slash, base = self.name.rpartition("/")
        return self.tar, folder + slash + base.partition(".")[0]

    @property
    def is_plain(self) -> bool:
        """Whether nothing stands between its sample's name and its kind."""
        return self.name.rpartition("/")[2].count(".") == 1


class TarSource:
    """Images of tar files, by the files' names and then as they lie in each.

    A sample's class is the number in its ``.cls`` where there are any; else its folder, the topmost
    that tells images apart, as of a folder on disk. Of several images of one sample, such as masks,
    that of the shortest name is taken.

    Raises:
        DataError: a file is no tar, compressed, cut short, or none holds an image.
    """

    def __init__(self, tars: Sequence[Path], *, labels: bool, extensions: Sequence[str]) -> None:
        self._tars = [tar.resolve() for tar in tars]
        self._open: tuple[int, int] | None = None  # a tar's number, and its descriptor
        self.passed_over: dict[str, list[str]] = {}
        self.starts: Sequence[int] = ()
        self.class_names: tuple[str, ...] = ()
        where = self._tars[0] if len(tars) == 1 else self._tars[0].parent
        self.description = {"kind": "tar", "path": str(where)}
        members = [member for tar in range(len(tars)) for member in self._members(tar)]
        images = [each for each in members if each.name.lower().endswith(tuple(extensions))]
        self._images = self._one_a_sample(images)
        if not self._images:
            raise DataError(f"{where}: no images ({' '.join(extensions)}) in it; --extensions")
        numbers = {m.key: m for m in members if m.name.endswith(_LABEL)}
        self._labels = [NO_LABEL] * len(self._images)
        if labels and numbers:
            self._labels = [self._number(numbers.get(each.key)) for each in self._images]
        elif labels:
            self._name_classes()
        for member in set(members).difference(images, numbers.values()):
            kind = PurePosixPath(member.name).suffix.lower() or "no extension"
            self._pass_over(f"not an image file ({kind})", member.tar, member.name)
        for names in self.passed_over.values():
            names.sort()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The tar's name and the member's."""
        member = self._images[index]
        return f"{self._tars[member.tar].name}/{member.name}"

    def sample(self, index: int) -> Sample:
        """The image's bytes and its class."""
        member = self._images[index]
        content = LeftOut(_TOO_LARGE) if member.size > MAX_FILE_BYTES else self._read(member)
        return Sample(content, self._labels[index])

    def _members(self, number: int) -> list[_Member]:
        path, found = self._tars[number], []
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    name = info.name.removeprefix("./")
                    if info.isdir():
                        continue
                    if why := _why_not(name):
                        self._pass_over(why, number, name)
                    elif info.isreg() and not info.issparse():
                        found.append(_Member(number, name, info.offset_data, info.size))
                    else:
                        self._pass_over("link, device or sparse file in a tar", number, name)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"{path}: no tar that can be read ({error}); unpack a compressed one, and copy one"
                " that is cut short again"
            ) from error
        return found

    def _one_a_sample(self, images: Sequence[_Member]) -> list[_Member]:
        plain: dict[tuple[int, str], _Member] = {}
        for image in images:
            if image.is_plain:
                plain.setdefault(image.key, image)
        kept = [image for image in images if plain.get(image.key, image) is image]
        for image in set(images).difference(kept):
            self._pass_over("another image of the same sample", image.tar, image.name)
        return kept

    def _number(self, member: _Member | None) -> int:
        if member is None:
            return NO_LABEL
        text = self._read(member) if member.size <= _LONGEST_LABEL else b""
        if not text.strip().isdigit() or int(text) > MAX_LABEL:
            raise DataError(
                f"{self._tars[member.tar]}: {member.name} holds no class's number; pack with"
                " --no-labels, or mend it"
            )
        return int(text)

    def _name_classes(self) -> None:
        folders = [PurePosixPath(each.name).parent for each in self._images]
        common = len(PurePosixPath(posixpath.commonpath(folders)).parts)
        if any(len(folder.parts) == common for folder in folders):
            return
        tops = [folder.parts[common] for folder in folders]
        self.class_names = tuple(sorted(set(tops)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = [numbers[top] for top in tops]

    def _read(self, member: _Member) -> bytes:
        if self._open is None or self._open[0] != member.tar:
            self.close()
            descriptor = os.open(self._tars[member.tar], os.O_RDONLY | os.O_CLOEXEC)
            self._open = member.tar, descriptor
        return os.pread(self._open[1], member.size, member.offset)

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    __del__ = close

    def _pass_over(self, why: str, tar: int, name: str) -> None:
        self.passed_over.setdefault(why, []).append(f"{self._tars[tar].name}/{name}")


def _why_not(name: str) -> str | None:
    """As of a folder on disk: what is hidden, or a system's."""
    *folders, base = name.split("/")
    reasons = (why_no_class(folder) for folder in folders)
    return next(filter(None, reasons), "hidden" if base.startswith(".") else None)
