"""Weighted nearest-neighbour classification of features (Wu et al. 2018, arXiv 1805.01978).

A test sample takes the ``k`` training samples of highest cosine similarity ``s``; each votes for
its class with weight ``exp(s / temperature)``. Several ``k`` share one search.

The result is a pure function of the features: see :mod:`trainer.features.neighbours`. Votes are
summed as fixed-point integers, whose sum does not depend on the order of the additions; classes
with equal votes rank by their number. A class that none of the neighbours belongs to is never
among the predicted ones.

Shape suffixes: N training samples, M test samples, F features, C classes, K neighbours, B rows of
a test block, T columns of a training block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.features.extraction import Features
from trainer.features.labels import accuracy, class_count, count_hits
from trainer.features.neighbours import nearest_rows

# Votes lie in (0, 1] of this scale. The sum of 2**18 votes fits an int64; a vote's rounding is
# 3e-14 of the nearest neighbour's.
_VOTE_SCALE = 1 << 44
MAX_K = 1 << 18
_ROWS = 1024  # test samples that vote at once


@dataclass(frozen=True)
class KnnResult:
    """Accuracy of weighted k nearest neighbours, as fractions in [0, 1]."""

    top1: float
    top5: float
    """Within the best ``min(5, classes)``."""
    k: int
    """Neighbours used: ``requested_k``, or all training samples where there are fewer."""
    requested_k: int


def knn_classify(train: Features, test: Features, k: int = 200, **how: Any) -> KnnResult:
    """:func:`knn_classify_each` for one ``k``."""
    return knn_classify_each(train, test, (k,), **how)[0]


@torch.no_grad()
def knn_classify_each(
    train: Features,
    test: Features,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    block: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> list[KnnResult]:
    """Classify test features by their nearest training features, for every ``k`` by one search.

    Args:
        train: labelled features of any float dtype on any device; compared in float32.
        test: as ``train``.
        ks: numbers of neighbours, up to ``MAX_K``; all training samples where there are fewer.
        temperature: of the votes, above 0.
        block: as of :func:`nearest_rows`. Memory beside the features is about 20 bytes for each
            pair of a block and ``16 k`` bytes for each test sample.
        device: where to compare; by default where the training features lie.

    Raises:
        DataError: a set is empty or not labelled.
    """
    num_classes = class_count(train.labels_N, test.labels_N)
    device = torch.device(device) if device is not None else train.features_NF.device
    kept = [min(k, len(train.labels_N)) for k in ks]
    similarity_MK, index_MK = nearest_rows(
        train.features_NF,
        test.features_NF,
        max(kept),
        device=device,
        block=block,
    )
    columns = similarity_MK, train.labels_N.cpu()[index_MK], test.labels_N
    hits_K2 = torch.zeros(len(ks), 2, dtype=torch.int64, device=device)
    for rows in zip(*(column.split(_ROWS) for column in columns)):
        similarity_BK, classes_BK, labels_B = (row.to(device) for row in rows)
        votes_BK = _votes(similarity_BK, temperature)
        for hits, k in zip(hits_K2, kept):
            sums_BC = votes_BK.new_zeros(len(votes_BK), num_classes)  # 0: no neighbour's class
            sums_BC.scatter_add_(1, classes_BK[:, :k], votes_BK[:, :k])
            hits += count_hits(sums_BC, labels_B, above=0)
    return [
        KnnResult(*accuracy(hits, len(test.labels_N)), used, k)
        for hits, used, k in zip(hits_K2, kept, ks)
    ]


def remark_on_k(k: int, num_train: int, num_classes: int, option: str) -> list[str]:
    """A remark where more neighbours vote than there are samples, or than a class has."""
    each = num_train // max(1, num_classes)
    if k <= each:
        return []
    if k > num_train:
        return [f"k {k} is more than the {num_train} training samples: all of them vote"]
    return [
        f"k {k} is more than the {each} training samples that a class has on average, so that most"
        f" votes are for other classes: compare {option} {max(1, min(20, each // 2))}"
    ]


def _votes(similarity_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Fixed-point votes, 1 or more: int64 (B, K)."""
    # Relative to the nearest neighbour: a factor per row, which no ranking sees.
    exponent_BK = (similarity_BK.double() - similarity_BK[:, :1].double()) / temperature
    return (exponent_BK.exp() * _VOTE_SCALE).round().long().clamp_min(1)
