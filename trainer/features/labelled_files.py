"""Two labelled sets whose classes must agree: one to learn from, one to measure on.

Classes are told by the names in the files' manifests; where names are missing, numbers are all
there is, and they are believed only where both sets have the same ones.

Shape suffixes: N samples of the training set, M of the other one, C class numbers of the latter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common.errors import DataError
from data_pipeline.reading.beton import DataInfo
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData

_MOST_NAMED = 5  # classes in a message


@dataclass(frozen=True)
class SharedClasses:
    """What the classes of one set are in another one."""

    numbers_C: torch.Tensor  # noqa: N815
    """int64, from a class number of the one set to that of the other; -1: it has no such class."""
    remarks: tuple[str, ...] = ()
    """What a reader of figures ought to know."""

    def renumbered(self, labels_M: torch.Tensor) -> torch.Tensor:
        """Labels in the numbers of the other set; -1 for what is unlabelled or unknown there."""
        return torch.where(labels_M >= 0, self.numbers_C[labels_M.clamp_min(0)], -1)


class Labels(NamedTuple):
    """Of a set to learn from and of one to measure on, in the numbers of the former."""

    train_N: torch.Tensor  # noqa: N815
    """int64; -1: none, as where the sample is damaged."""
    test_M: torch.Tensor  # noqa: N815
    """int64; -1 also for a class that the other set does not have."""
    classes: SharedClasses


def compare_labels(train: OpenData, test: OpenData) -> Labels:
    """Labels of two sets where one may have classes, or samples, that the other knows nothing of.

    Raises:
        DataError: a set gives two classes one name, and the two sets' names differ.
    """
    labels_N, labels_M = _labels(train), _labels(test)
    classes = _share_classes(train.info, test.info, labels_N, labels_M)
    common = set(train.info.identities) & set(test.info.identities)
    if common and train.info.identity != test.info.identity:
        names = [str(f.path) for f in test.files if f.info.identity in common]
        remark = (
            f"warning: {', '.join(names)}: is in both sets: what was learnt from is measured on"
        )
        classes = replace(classes, remarks=(*classes.remarks, remark))
    return Labels(labels_N, classes.renumbered(labels_M), classes)


def read_labels(train: OpenData, test: OpenData, *, throughout: bool = True) -> Labels:
    """Labels of two sets that can be compared, before anything slow happens.

    A class of ``train`` that ``test`` lacks is no fault.

    Args:
        train: a labelled set to learn from.
        test: a labelled set to measure on.
        throughout: every sample of ``train`` must have a label; else one.

    Raises:
        DataError: a set is not labelled throughout; a class of ``test`` is none of ``train``, or
            nobody can tell.
    """
    labelled = (*train.files, *test.files) if throughout else test.files
    for info in (file.info for file in labelled):
        if not info.has_label:
            raise DataError(
                f"{info.name}: {info.num_samples - info.num_labelled} of {info.num_samples} "
                "samples have no label; pack a folder with one sub-folder per class, or a "
                "labelled data set"
            )
    labels = compare_labels(train, test)
    classes, labels_M = labels.classes, _labels(test)
    learnt, occurring = (each[each >= 0].unique() for each in (labels.train_N, labels_M))
    unknown = occurring[~torch.isin(classes.numbers_C[occurring], learnt)].tolist()
    names_N, names_M = train.info.class_names, test.info.class_names
    if unknown and not (names_N and names_M):
        raise DataError("; ".join(classes.remarks))
    if unknown:
        names = [names_M[number] for number in unknown]
        there = [names_N[number] for number in learnt.tolist()]
        raise DataError(
            f"{test.info.name}: {len(names)} of its {len(occurring)} classes are not in "
            f"{train.info.name}: "
            f"{_listed(names)} (there: {_listed(there)}); pack both from folders with the same "
            "class names"
        )
    return labels


def _labels(data: OpenData) -> torch.Tensor:
    return torch.from_numpy(data.table.labels)


def _share_classes(
    train: DataInfo, test: DataInfo, labels_N: torch.Tensor, labels_M: torch.Tensor
) -> SharedClasses:
    numbers_C = torch.arange(max(len(test.class_names), int(labels_M.max()) + 1, 1))
    learnt, occurring = (labels[labels >= 0].unique() for labels in (labels_N, labels_M))
    remark = ""
    if train.identity == test.identity:
        remark = (
            f"warning: {train.name} and {test.name} have the same content: this is the accuracy on "
            "what was learnt from"
        )
    elif train.class_names and test.class_names:
        numbers_C = _numbers_by_name(train, test)
    elif len(learnt) and torch.equal(learnt, occurring):
        remark = (
            f"warning: {_nameless(train, test)}: classes are matched by their numbers, and the "
            "figures mean something only if both files number the same classes alike"
        )
    elif len(learnt) and len(occurring):
        numbers_C = torch.full_like(numbers_C, -1)
        remark = (
            f"{_nameless(train, test)}, and their class numbers differ, so nobody can tell which "
            "class is which; bring the manifests (FILE.beton.json) along, or pack both again with "
            "'widebatch pack'"
        )
    return SharedClasses(numbers_C, (remark,) if remark else ())


def _numbers_by_name(train: DataInfo, test: DataInfo) -> torch.Tensor:
    """int64 (C,)."""
    if train.class_names == test.class_names:  # two classes may have one name then
        return torch.arange(len(test.class_names))
    for info in (train, test):
        twice = [name for name, count in Counter(info.class_names).items() if count > 1]
        if twice:
            raise DataError(
                f"{info.name}: two classes are named {twice[0]!r}, so names do not tell which is "
                "which; pack it again from folders with different names"
            )
    known = {name: number for number, name in enumerate(train.class_names)}
    return torch.tensor([known.get(name, -1) for name in test.class_names], dtype=torch.int64)


def _nameless(*infos: DataInfo) -> str:
    missing = [info.name for info in infos if not info.class_names]
    there = all(manifest_path(path).exists() for info in infos for path in info.paths)
    why = "the manifest names none" if there else "no manifest FILE.beton.json beside it"
    return f"{' and '.join(missing)} give no names of classes ({why})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
