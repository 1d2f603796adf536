"""Images in tar files: WebDataset's shards, or folders of images in an archive.

Nothing is extracted: heads are read, and each image where it lies.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from common.errors import DataError
from common.files.regular_file import open_regular
from data_pipeline.packing.folder_source import SPLITS, why_no_class
from data_pipeline.packing.image_codec import MAX_FILE_BYTES, NO_LABEL, LeftOut, Sample
from data_pipeline.reading.beton import MAX_LABEL

_LABEL = ".cls"
_LONGEST_LABEL = 32  # bytes
_BLOCK = 1 << 20  # bytes, of what lies behind the end
_TOO_LARGE = f"larger than {MAX_FILE_BYTES >> 30} GiB"
_NOT_A_FILE = "link, device or sparse file in a tar"


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
    that of the shortest name is taken. Of members of one name the last is, as tar itself has it.

    Raises:
        DataError: a file is no tar, compressed, damaged or cut short, or none holds an image.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        labels: bool,
        extensions: Sequence[str],
        beside: Sequence[str] = (),
    ) -> None:
        self._open: tuple[int, int] | None = None  # a tar's number, and its descriptor
        self._tars = [tar.absolute() for tar in tars]  # a link has the name that people know
        self._states: list[tuple[int, ...]] = []
        self.passed_over: dict[str, list[str]] = {"not a tar file": list(beside)} if beside else {}
        self.starts: Sequence[int] = ()
        self.class_names: tuple[str, ...] = ()
        where = self._tars[0] if len(tars) == 1 else self._tars[0].parent
        self.description = {"kind": "tar", "path": str(where)}
        members = [member for tar in range(len(tars)) for member in self._members(tar)]
        numbers = {m.key: m for m in members if m.name.endswith(_LABEL)}
        images = [each for each in members if each.name.lower().endswith(tuple(extensions))]
        self._images = self._one_a_sample(images, bool(numbers))
        if not self._images:
            raise DataError(f"{where}: no images ({' '.join(extensions)}) in it; --extensions")
        self._labels = [NO_LABEL] * len(self._images)
        if labels and numbers:
            self._labels = [self._number(numbers.get(each.key)) for each in self._images]
        elif labels:
            self._name_classes(where)
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
        """The image's bytes and its class.

        Raises:
            DataError: the tar is not as it was.
        """
        member = self._images[index]
        content = LeftOut(_TOO_LARGE) if member.size > MAX_FILE_BYTES else self._read(member)
        return Sample(content, self._labels[index])

    def _members(self, number: int) -> list[_Member]:
        path, found = self._tars[number], dict[str, _Member]()
        try:
            with open_regular(path) as file:
                self._states.append(_state(file.fileno()))
                for info in _heads(file):
                    parts = [part for part in info.name.split("/") if part not in ("", ".")]
                    name = "/".join(parts)
                    if info.isdir():
                        continue
                    if why := _why_not(parts):
                        self._pass_over(why, number, name)
                    elif not info.isreg() or info.issparse():
                        self._pass_over(_NOT_A_FILE, number, name)
                    else:
                        if found.pop(name, None) is not None:
                            self._pass_over("older member of the same name", number, name)
                        found[name] = _Member(number, name, info.offset_data, info.size)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{path}: no tar that can be read ({error}); unpack a compressed one, and copy one"
                " that is damaged or cut short again"
            ) from error
        return list(found.values())

    def _one_a_sample(self, images: Sequence[_Member], of_samples: bool) -> list[_Member]:
        """Without labels of samples, names with several dots may be of images of their own."""
        first: dict[tuple[int, str], _Member] = {}
        for image in sorted(images, key=lambda each: (len(each.name), each.name)):
            if image.is_plain or of_samples:
                first.setdefault(image.key, image)
        kept = [image for image in images if first.get(image.key, image) is image]
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

    def _name_classes(self, where: Path) -> None:
        folders = [PurePosixPath(each.name).parent for each in self._images]
        common = len(PurePosixPath(posixpath.commonpath(folders)).parts)
        tops = [folder.parts[common] if len(folder.parts) > common else "" for folder in folders]
        names = sorted({top for top in tops if top})
        if not names:
            return
        if {name.lower() for name in names} <= SPLITS:
            raise DataError(
                f"{where}: its folders {', '.join(names)} are splits, not classes; pack a tar of"
                " each, or all of them without labels (--no-labels)"
            )
        for image, top in zip(self._images, tops):
            if not top:
                self._pass_over("outside the class folders", image.tar, image.name)
        self._images = [image for image, top in zip(self._images, tops) if top]
        self._labels = [names.index(top) for top in tops if top]
        self.class_names = tuple(names)

    def _read(self, member: _Member) -> bytes:
        path = self._tars[member.tar]
        if self._open is None or self._open[0] != member.tar:
            self.close()
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open = member.tar, descriptor
        content = os.pread(self._open[1], member.size, member.offset)
        if _state(self._open[1]) != self._states[member.tar] or len(content) != member.size:
            raise DataError(f"{path}: changed while it was packed; pack it again")
        return content

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    __del__ = close

    def _pass_over(self, why: str, tar: int, name: str) -> None:
        self.passed_over.setdefault(why, []).append(f"{self._tars[tar].name}/{name}")


def _heads(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Of all members; the library takes a damaged head for the end, which is looked at here.

    Raises:
        tarfile.TarError: the end is none.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if info.size < 0:
                raise tarfile.ReadError("a head states a negative size")
            yield info
        file.seek(tar.offset)
    if len(behind := file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")
    while behind:
        if behind.count(0) != len(behind):
            raise tarfile.ReadError("a damaged head, or another archive behind the end")
        behind = file.read(_BLOCK)


def _state(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _why_not(parts: Sequence[str]) -> str | None:
    """As of a folder on disk: what is hidden, or a system's."""
    *folders, base = parts or ("",)
    reasons = (why_no_class(folder) for folder in folders)
    return next(filter(None, reasons), "hidden" if base.startswith(".") else None)
