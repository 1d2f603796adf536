"""Query images, from wherever they come: a packed file, a folder, single files.

Images that are not packed are, into a temporary file: so they are decoded, cut and refused exactly
as training images are.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import ConfigError, DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.packing.sources import IMAGE_EXTENSIONS
from data_pipeline.reading.beton import BetonInfo, check_beton
from trainer.evaluation.labelled_subset import names_or_why_not
from trainer.features.labelled_files import compare_labels


@dataclass(frozen=True)
class Queries:
    """A packed file of queries, there as long as the block of :func:`open_queries`."""

    path: Path
    info: BetonInfo
    described: str
    """Where they come from."""
    labels_M: torch.Tensor  # noqa: N815
    """int64, in the numbers of the searched file's classes; -1: none."""
    remarks: tuple[str, ...]
    """What a reader of figures by labels ought to know."""
    names: list[str] | None
    """Their files, where that is known."""


@contextlib.contextmanager
def open_queries(given: Sequence[Path], searched: BetonInfo) -> Iterator[Queries]:
    """Pack what is not packed.

    Args:
        given: one .beton file, one folder, or image files.
        searched: the file that is searched. Its classes give the labels their numbers.

    Raises:
        ConfigError: ``given`` mixes kinds, or names what is not there or no image.
        DataError: no image can be used.
    """
    with contextlib.ExitStack() as stack:
        path = given[0]
        if len(given) > 1 or path.suffix != ".beton":
            path = _packed(given, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        info = check_beton(path)
        labels = compare_labels(searched, info)
        labels_M, remarks = labels.test_M, labels.classes.remarks
        folder = given[0].resolve().name if given[0].is_dir() else ""
        if folder in searched.class_names and not info.class_names:
            labels_M = torch.full_like(labels_M, searched.class_names.index(folder))
            remarks = (f"the queries are judged as {folder}: their folder is called so",)
        some = [str(each.absolute()) for each in given[:3]]
        described = ", ".join(some + ["..."] * (len(given) > 3))
        names = names_or_why_not(path)[0]
        if path != given[0] and not given[0].is_dir():
            names = list(map(str, given))
        yield Queries(path, info, described, labels_M, remarks, names)


def _packed(given: Sequence[Path], folder: Path) -> Path:
    for path in given:
        if not path.exists():
            raise ConfigError(f"--query {path}: no such file or folder")
    source = given[0]
    if len(given) > 1 or not source.is_dir():
        source = folder / "images"
        source.mkdir()
        for number, path in enumerate(given):
            if path.is_dir() or path.suffix.lower() not in IMAGE_EXTENSIONS:
                raise ConfigError(
                    f"--query {path}: name one .beton file, one folder, or image files "
                    f"({' '.join(IMAGE_EXTENSIONS)})"
                )
            # Numbered: packing orders by name, and queries keep the order they are given in.
            (source / f"{number:06d}{path.suffix.lower()}").symlink_to(path.resolve())
    out = folder / "queries.beton"
    report = pack(str(source), out, PackConfig(workers=1), progress=False)
    for name, reason in report.left_out:
        raise DataError(f"--query {(source / name).resolve()}: {reason}; mend it or leave it out")
    return out
