"""Labels: how many classes, few of them, a split, and the accuracy of scores.

Shape suffixes: N samples, C classes, B rows of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from common.errors import DataError
from data_pipeline.reading.order import IdArray, permute
from trainer.features.extraction import Features


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


def draw_by_class(labels_N: IdArray, count: Callable[[int], int], seed: int) -> IdArray:
    """Of every class as many samples as ``count`` says of its size: indices, ascending.

    A pure function of the labels' order, the counts and ``seed``; with one seed, fewer of a class
    are a subset of more, so curves over a budget are comparable.
    """
    chosen = []
    for label in np.unique(labels_N).tolist():
        members = np.flatnonzero(labels_N == label)
        # The class takes the place of the epoch: every class has its own permutation.
        places = permute(seed, label, np.arange(count(len(members))), len(members))
        chosen.append(members[places])
    return np.sort(np.concatenate(chosen))


def few_per_class(labels_N: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    """Choose ``per_class`` samples of every class that occurs, by :func:`draw_by_class`.

    Raises:
        DataError: a class has fewer samples than asked for.
    """
    classes, counts = np.unique(labels_N.cpu().numpy(), return_counts=True)
    for label, members in zip(classes, counts):
        if members < per_class:
            raise DataError(
                f"class {label} has {members} labelled samples, fewer than the "
                f"{per_class} asked for per class: ask for at most {counts.min()}"
            )
    return torch.from_numpy(draw_by_class(labels_N.cpu().numpy(), lambda _: per_class, seed))


def hold_out(
    labels_N: torch.Tensor, fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split by class: (indices to fit, indices held out), int64, ascending.

    Of a class at least one sample is kept and, of two or more, at least one held out.
    """
    labels = labels_N.cpu().numpy()
    held = draw_by_class(labels, lambda n: min(max(round(fraction * n), 1), n - 1), seed)
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return torch.from_numpy(kept), torch.from_numpy(held)


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


@torch.no_grad()
def accuracy_of(
    scores: Callable[[torch.Tensor], torch.Tensor],
    data: Features,
    device: torch.device,
    rows: int = 8192,
) -> Accuracy:
    """Of ``scores``, which takes so many ``rows`` of features at a time and gives (B, C)."""
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    for features_BF, labels_B in data.blocks(rows, device):
        hits += count_hits(scores(features_BF), labels_B)
    return accuracy(hits, len(data.labels_N))
