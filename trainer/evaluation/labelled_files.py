"""Two labelled files whose classes must agree: one to learn from, one to measure on."""

from collections.abc import Iterator

import torch

from data_pipeline.beton import BetonInfo, read_sample_table
from data_pipeline.errors import DataError


def read_labels(train: BetonInfo, test: BetonInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of both files, int64, before anything slow happens.

    Raises:
        DataError: a file is not labelled throughout, or the files' classes differ.
    """
    for info in (train, test):
        if not info.has_label:
            raise DataError(
                f"{info.path}: {info.num_samples - info.num_labelled} of {info.num_samples} "
                "samples have no label; pack a folder with one sub-folder per class, or a "
                "labelled data set"
            )
    if train.class_names and test.class_names and train.class_names != test.class_names:
        raise DataError(_first_difference(train, test))
    labels_N, labels_M = (torch.from_numpy(read_sample_table(i.path).labels) for i in (train, test))
    return labels_N, labels_M


def remarks(train: BetonInfo, test: BetonInfo) -> Iterator[str]:
    """What a reader of the result ought to know of the two files."""
    if train.fingerprint == test.fingerprint:
        yield (
            f"warning: {train.path} and {test.path} have the same content: this is the accuracy "
            "on what was learnt from"
        )
    if bool(train.class_names) != bool(test.class_names):
        yield "only one of the two files names its classes: they are matched by number"


def _first_difference(train: BetonInfo, test: BetonInfo) -> str:
    number = next(
        (n for n, (a, b) in enumerate(zip(train.class_names, test.class_names)) if a != b),
        min(len(train.class_names), len(test.class_names)),
    )
    names = [
        repr(info.class_names[number]) if number < len(info.class_names) else "missing"
        for info in (train, test)
    ]
    return (
        f"class {number} is {names[0]} in {train.path} and {names[1]} in {test.path}: "
        "pack both from folders with the same class names"
    )
