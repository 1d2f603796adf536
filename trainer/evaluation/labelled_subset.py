"""Which training samples may show their labels: a share of every class, or a published list.

Shape suffixes: N samples of a set.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import ConfigError, DataError
from data_pipeline.packing.clip_source import ClipSource
from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS, FolderSource
from data_pipeline.packing.sources import Share, Source
from data_pipeline.reading.manifest import load_manifest, manifest_path
from data_pipeline.reading.open_beton import OpenBeton
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import IdArray
from trainer.features.labels import draw_by_class

_MOST_BYTES = 1 << 30  # of a list


def balanced_share(labels_N: IdArray, fraction: float, seed: int) -> IdArray:
    """Sample ids of a class-balanced share, ascending.

    Every class has the same number of samples, ``fraction`` of the mean class and at least one; a
    smaller class gives all it has. With one seed, a smaller share is a subset of a larger one. All
    samples where ``fraction`` is 1.
    """
    if fraction == 1:
        return np.arange(len(labels_N))
    each = max(1, round(fraction * len(labels_N) / len(np.unique(labels_N))))
    return draw_by_class(labels_N, lambda members: min(each, members), seed)


def read_list(path: Path, train: OpenData, images: Path | None = None) -> IdArray:
    """Sample ids that a text file lists, one a line, ascending.

    Lines are sample ids, or names of the image files that were packed: with their folders or, where
    that is unique, without, as in SimCLR's ``imagenet_subsets/1percent.txt``. ``images`` is as of
    :func:`packed_names`.

    Raises:
        DataError: the list cannot be read, is empty, names a sample twice or one that is not there.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: too large for a list of samples")
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it lists samples, one a line") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not text; it lists samples, one a line") from None
    if not lines:
        raise DataError(f"{path}: lists no samples")
    count = train.info.num_samples
    if all(line.isascii() and line.isdecimal() for line in lines):
        ids = [min(int(line[:20]), count) for line in lines]
        if max(ids) >= count:
            raise DataError(
                f"{path}: {lines[int(np.argmax(ids))]} is no sample of {train.info.name}"
            )
    else:
        ids = _find(lines, path, packed_names(train, images), train.info.name)
    unique, first, times = np.unique(ids, return_index=True, return_counts=True)
    if (times > 1).any():
        raise DataError(f"{path}: lists {lines[int(first[times > 1][0])]} twice")
    return unique.astype(np.int64)


def packed_names(train: OpenData, images: Path | None = None) -> list[str]:
    """Paths below the packed folder, in the order of the sample ids.

    They are in the manifests of files that are not too large, else in the folder, which is
    ``images`` where it is not that of the manifest any more.

    Raises:
        DataError: there is no manifest, or the folder is not there or not as it was packed.
    """
    return [name for file in train.files for name in _packed_names(file, images)]


def told_apart(data: OpenData) -> list[str]:
    """The same, behind their .beton's name where images of two files have one.

    Raises:
        DataError: as :func:`packed_names`.
    """
    names = packed_names(data)
    if len(set(names)) == len(names):
        return names
    files = (file.path.name for file in data.files for _ in range(file.info.num_samples))
    return [f"{file}: {name}" for file, name in zip(files, names)]


def _packed_names(file: OpenBeton, images: Path | None) -> list[str]:
    train, manifest = file.path, load_manifest(file.path) or {}
    named = manifest.get("images")
    if images is None and isinstance(named, list) and len(named) == file.info.num_samples:
        return list(map(str, named))
    origin, settings = manifest.get("source"), manifest.get("settings")
    remedy = "give sample ids instead, or pack the folder again"
    if not (isinstance(origin, dict) and origin.get("kind") == "folder"):
        raise DataError(f"{manifest_path(train)}: names no folder of images; {remedy}")
    left_out = manifest.get("left_out", [])
    told = isinstance(left_out, list) and all(isinstance(each, dict) for each in left_out)
    if not isinstance(settings, dict) or not isinstance(origin.get("path"), str) or not told:
        raise DataError(f"{manifest_path(train)}: does not say what was packed; {remedy}")
    folder = Path(origin["path"]) if images is None else images
    if not folder.is_dir():
        raise DataError(f"{folder}: the folder that {train} was packed from is not there: --images")
    given = settings.get("extensions")
    extensions = tuple(map(str, given)) if isinstance(given, list) else IMAGE_EXTENSIONS
    kind = ClipSource if settings.get("clips") is True else FolderSource
    source: Source = kind(folder, labels=settings.get("labels") is not False, extensions=extensions)
    if (share := str(settings.get("shard", "1/1"))) != "1/1":
        try:
            source = Share(source, share)
        except (ConfigError, DataError):
            raise DataError(f"{folder}: is not as it was packed; {remedy}") from None
    gone = {str(each.get("image")) for each in left_out}
    kept = [i for i in range(len(source)) if source.name(i) not in gone]
    labels = file.table.labels.tolist()
    if [source.sample(i).label for i in kept] != labels:
        raise DataError(
            f"{folder}: its images are not those that {train} was packed from; {remedy}"
        )
    return [source.name(i) for i in kept]


def _find(lines: Sequence[str], path: Path, names: Sequence[str], train: str) -> list[int]:
    by_name: dict[str, int] = {}
    by_base: dict[str, int] = {}
    for number, name in enumerate(names):
        by_name[name] = -1 if name in by_name else number  # in two files of the set
        base = name.rpartition("/")[2]
        by_base[base] = -1 if base in by_base else number
    ids = []
    for line in lines:
        found = by_name.get(line, by_base.get(line))
        if found is None:
            raise DataError(f"{path}: {line} is no image of {train}")
        if found < 0:
            raise DataError(
                f"{path}: several images of {train} are called {line}: add the folder, or give"
                " sample ids where the names in two files are the same"
            )
        ids.append(found)
    return ids
