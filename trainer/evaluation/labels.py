"""Labels: how many classes, few of them, a split, and the accuracy of scores.

Shape suffixes: N samples, C classes, B rows of a block.
"""

from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.errors import DataError
from data_pipeline.order import IdArray, permute


class Accuracy(NamedTuple):
    """Fractions in [0, 1] of the test samples."""

    top1: float
    top5: float
    """Accuracy within the best ``min(5, classes)``."""


def class_count(*labels: torch.Tensor) -> int:
    """Number of classes in one or more label tensors: the largest label plus one.

    Raises:
        DataError: there are no labels, or some sample has none (labels are negative).
    """
    for labels_N in labels:
        if labels_N.numel() == 0:
            raise DataError("there are no samples: evaluation needs at least one")
        if int(labels_N.min()) < 0:
            raise DataError(
                "samples have no labels: evaluation needs a labelled file "
                "(pack a folder with one sub-folder per class)"
            )
    return 1 + max(int(labels_N.max()) for labels_N in labels)


def few_per_class(labels_N: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    """Choose ``per_class`` samples of every class that occurs: int64 indices, ascending.

    A pure function of the labels' order, ``per_class`` and ``seed``; with one seed, a smaller
    budget is a subset of a larger one, so curves over the budget are comparable.

    Raises:
        DataError: a class has fewer samples than asked for.
    """
    labels = labels_N.cpu().numpy()
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise DataError(
                f"class {label} has {len(members)} labelled samples, fewer than the "
                f"{per_class} asked for per class: ask for at most {_smallest_class(labels)}"
            )
        chosen.append(draw_of_class(members, per_class, int(label), seed))
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def draw_of_class(members: IdArray, count: int, label: int, seed: int) -> IdArray:
    """``count`` of the samples of class ``label``; fewer are a subset of more."""
    # The class takes the place of the epoch: every class has its own permutation.
    return members[permute(seed, label, np.arange(count), len(members))]


def hold_out(
    labels_N: torch.Tensor, fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split by class: (indices to fit, indices held out), int64, ascending.

    Of every class with two samples or more at least one is held out and at least one is kept; a
    class with one sample is kept.
    """
    labels = labels_N.cpu().numpy()
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[draw_of_class(members, count, int(label), seed)] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def count_hits(
    scores_BC: torch.Tensor, labels_B: torch.Tensor, above: float | None = None
) -> torch.Tensor:
    """Samples whose class has the best score, and one of the best ``min(5, C)``: int64 (2,).

    Equal scores go to the lower class number, so the count is the same on every device. With
    ``above``, a class whose score is not above it is no prediction.
    """
    scores_BC, best_BC = scores_BC.sort(dim=1, descending=True, stable=True)
    hit_B5 = best_BC[:, :5] == labels_B.unsqueeze(1)
    if above is not None:
        hit_B5 &= scores_BC[:, :5] > above
    return torch.stack([hit_B5[:, 0].sum(), hit_B5.any(dim=1).sum()])


def accuracy(hits: torch.Tensor, num_samples: int) -> Accuracy:
    """Fractions from the two counts of :func:`count_hits`."""
    top1, top5 = hits.tolist()
    return Accuracy(top1 / num_samples, top5 / num_samples)


def _smallest_class(labels: np.ndarray) -> int:
    counts = np.bincount(labels)
    return int(counts[counts > 0].min())
