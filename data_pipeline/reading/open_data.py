"""One or several .beton files as one set of samples, proved once and open for all who read it.

Samples are numbered on from file to file, in the order in which the files are given.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.reading.beton import DataInfo, SampleTable, name_of, sample_count
from data_pipeline.reading.clips import Clips, read_clips
from data_pipeline.reading.damage import allowance, check_limit
from data_pipeline.reading.manifest import load_manifest
from data_pipeline.reading.open_beton import OpenBeton

log = logging.getLogger(__name__)


class OpenData:
    """Checked files that stay open; training, evaluation and features share one object.

    Args:
        paths: one file, or several. Classes of one name are one class.
        max_damaged: samples of the set that may be damaged in its tables; below 1 a fraction of
            all. Above 0, whoever reads the set shows others in the place of all damaged ones.

    Attributes:
        files: one by one.
        info, table: what the set holds. Offsets are those in a sample's own file.
        descriptors_N: int32, of the file of each sample, for ``pread``.

    Raises:
        DataError: a file cannot be used, or is there twice.
    """

    def __init__(self, paths: Path | str | Sequence[Path | str], max_damaged: float = 0) -> None:
        check_limit(max_damaged, "--data.max-substitutes")
        given = [paths] if isinstance(paths, Path | str) else paths
        names = tuple(map(Path, given))
        if not names:
            raise DataError("no .beton file is named after --data.train or --data.test")
        self.max_damaged, files = max_damaged, list[OpenBeton]()
        left = allowance(max_damaged, sum(map(sample_count, names)))
        for name in names:
            files.append(OpenBeton(name, left))
            left -= len(files[-1].table.damaged)
        self.files = tuple(files)
        self._starts = np.cumsum([0, *(file.info.num_samples for file in files)])
        self.info, self.table = _joined([(file.info, file.table) for file in files])
        counts = [file.info.num_samples for file in files]
        self.descriptors_N = np.repeat(
            np.array([file.descriptor for file in files], np.int32), counts
        )

    @property
    def num_classes(self) -> int:
        """By name, or else by the greatest label; 0 where there is no label."""
        return len(self.info.class_names) or int(self.table.labels.max(initial=-1)) + 1

    @cached_property
    def clips(self) -> Clips:
        """Whose frames the samples are.

        Raises:
            DataError: a file was packed without clips.
        """
        counts = [file.info.num_samples for file in self.files]
        manifests = [load_manifest(file.path) or {} for file in self.files]
        return read_clips(self.info.name, counts, manifests)

    def place(self, sample: int) -> str:
        """A sample for messages: its file, and its number there."""
        file, number = self._find(sample)
        return f"{file.path}: sample {number}"

    def places_in(self, other: "OpenData") -> npt.NDArray[np.int64] | None:
        """The numbers that this set's samples have in another one; None unless it has all files."""
        starts = dict(zip(other.info.identities, other._starts.tolist()))
        if not starts.keys() >= set(self.info.identities):
            return None
        return np.concatenate(
            [starts[file.info.identity] + np.arange(file.info.num_samples) for file in self.files]
        )

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        """The bytes of a sample. Safe to call from several threads.

        Raises:
            DataError: its file was cut.
            OSError: it cannot be read; names it.
        """
        file, number = self._find(sample)
        return file.read(number)

    def check_unchanged(self) -> None:
        """As :meth:`OpenBeton.check_unchanged`, of every file."""
        for file in self.files:
            file.check_unchanged()

    def _find(self, sample: int) -> tuple[OpenBeton, int]:
        which = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.files[which], sample - int(self._starts[which])


def joint_digest(digests: Sequence[str]) -> str:
    """A digest of several, in their order; that of one file is its own. Empty where one is."""
    if len(digests) == 1 or not all(digests):
        return digests[0] if all(digests) else ""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _joined(files: Sequence[tuple[DataInfo, SampleTable]]) -> tuple[DataInfo, SampleTable]:
    if len(files) == 1:
        return files[0]
    infos, tables = zip(*files)
    paths = tuple(path for info in infos for path in info.paths)
    identities = [info.identity for info in infos]
    for number, identity in enumerate(identities):
        if identity in identities[:number]:
            raise DataError(
                f"{paths[number]}: has the content of {paths[identities.index(identity)]}, which "
                "is in the set already; name each file once"
            )
    target_names = tuple(dict.fromkeys(name for info in infos for name in info.target_names))
    targets = [_of_all_targets(info, table, target_names) for info, table in files]
    class_names = _class_names(infos)
    labels = [_renumbered(info, table, class_names) for info, table in files]
    columns = {
        column.name: np.concatenate([getattr(table, column.name) for table in tables])
        for column in fields(SampleTable)
        if column.name not in ("labels", "targets", "identity", "damaged")
    }
    identity = joint_digest(identities)
    damaged: dict[int, str] = {}
    first = 0
    for info, table in files:
        damaged |= {first + sample: why for sample, why in table.damaged.items()}
        first += info.num_samples
    table = SampleTable(
        **columns,
        labels=np.concatenate(labels),
        targets=np.concatenate(targets),
        identity=identity,
        damaged=damaged,
    )
    info = replace(
        infos[0],
        paths=paths,
        num_samples=first,
        num_labelled=sum(info.num_labelled for info in infos),
        class_names=class_names,
        fingerprint=joint_digest([info.fingerprint for info in infos]),
        identity=identity,
        identities=tuple(identities),
        target_names=target_names,
        num_damaged=len(damaged),
    )
    return info, table


def _of_all_targets(
    info: DataInfo, table: SampleTable, names: tuple[str, ...]
) -> npt.NDArray[np.float64]:
    """A file's targets among those of all files; what it has none of is unknown."""
    found = np.full((info.num_samples, len(names)), np.nan)
    found[:, [names.index(name) for name in info.target_names]] = table.targets
    return found


def _class_names(infos: Sequence[DataInfo]) -> tuple[str, ...]:
    """Of all files, in the order in which they come up; empty where no file has any.

    Raises:
        DataError: of labelled files some name their classes and some do not; a file gives two
            classes one name, so that the name does not tell which is meant.
    """
    labelled = [info for info in infos if info.num_labelled]
    named = [info for info in labelled if info.class_names]
    if not named and len(labelled) > 1:
        log.warning(
            "%s: no manifest names classes: those of one number are taken for one class",
            name_of([path for info in labelled for path in info.paths]),
        )
    if not named or all(info.class_names == named[0].class_names for info in labelled):
        return named[0].class_names if named else ()
    for info in labelled:
        if not info.class_names:
            raise DataError(
                f"{info.name}: has labels and no manifest that names their classes, as "
                f"{named[0].name} has; bring FILE.beton.json along, or pack it again with "
                "'widebatch pack'"
            )
        if len(set(info.class_names)) < len(info.class_names):
            raise DataError(
                f"{info.name}: two classes have one name, so names do not tell which is which in "
                f"{name_of([path for info in infos for path in info.paths])}; pack it again from "
                "folders with different names"
            )
    return tuple(dict.fromkeys(name for info in labelled for name in info.class_names))


def _renumbered(
    info: DataInfo, table: SampleTable, class_names: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    """Labels of a file in the numbers of the set's classes."""
    if info.class_names == class_names or not info.num_labelled:
        return table.labels
    known: Mapping[str, int] = {name: number for number, name in enumerate(class_names)}
    numbers_C = np.array([known[name] for name in info.class_names], np.int64)
    return np.where(table.labels >= 0, numbers_C[table.labels.clip(0)], -1)
