"""Weighted nearest-neighbour classification of features (Wu et al. 2018, arXiv 1805.01978).

A test sample takes the ``k`` training samples of highest cosine similarity ``s``; each votes for
its class with weight ``exp(s / temperature)``. Exact: every pair is compared, in blocks, with a
running list of the best ``k``; the similarity matrix is never held.

The result is a pure function of the features. Neighbours of equal similarity are taken in the order
of the training samples. Votes are summed as fixed-point integers, whose sum does not depend on the
order of the additions; classes with equal votes rank by their number. A class that none of the
neighbours belongs to is never among the predicted ones.

Shape suffixes: N training samples, M test samples, F features, C classes, K neighbours, B rows of
a test block, T columns of a training block.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from trainer.errors import ConfigError
from trainer.evaluation.labels import accuracy, class_count, count_hits

# Votes lie in (0, 1] of this scale. The sum of 2**18 votes fits an int64; a vote's rounding is
# 3e-14 of the nearest neighbour's.
_VOTE_SCALE = 1 << 44
_MAX_K = 1 << 18
_LOW_WORD = 0xFFFFFFFF  # also the largest training set


@dataclass(frozen=True)
class KnnResult:
    """Accuracy of weighted k nearest neighbours, as fractions in [0, 1]."""

    top1: float
    top5: float
    """Within the best ``min(5, num_classes)``."""
    k: int
    """Neighbours used: ``requested_k``, or all training samples where there are fewer."""
    requested_k: int
    temperature: float
    num_classes: int


@torch.no_grad()
def knn_classify(
    train_NF: torch.Tensor,
    train_labels_N: torch.Tensor,
    test_MF: torch.Tensor,
    test_labels_M: torch.Tensor,
    k: int = 200,
    temperature: float = 0.07,
    num_classes: int | None = None,
    *,
    block: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> KnnResult:
    """Classify test features by their nearest training features.

    Args:
        train_NF: features of any float dtype on any device; compared in float32.
        train_labels_N: int64, from 0.
        test_MF: as ``train_NF``.
        test_labels_M: int64, from 0.
        k: neighbours; all training samples where there are fewer.
        temperature: of the votes, above 0.
        num_classes: at least the largest label of either set plus one, which is the default.
        block: (test rows, training rows) compared at once. Memory beside the features is about
            20 bytes for each pair of a block and ``8 k`` bytes for each test sample.
        device: where to compare; by default where ``train_NF`` lies.
        rank: with ``world_size`` above 1, this process's number. All ranks hold the same features
            and must call; they share the test blocks and get the same result as one process.
        world_size: number of processes that call.

    Raises:
        ConfigError: ``k`` or ``temperature`` is out of range.
        DataError: a set is empty or not labelled.
    """
    _check(k, temperature, len(train_NF))
    num_classes = max(num_classes or 0, class_count(train_labels_N, test_labels_M))
    device = torch.device(device) if device is not None else train_NF.device
    kept = min(k, len(train_NF))
    rows, columns = block or ((128, 4096) if device.type == "cpu" else (1024, 32_768))
    mine_M = _share_of_blocks(len(test_MF), rows, rank, world_size)

    hits = torch.zeros(2, dtype=torch.int64, device=device)
    with full_float32(device):
        neighbours = _nearest(train_NF, test_MF[mine_M], kept, (rows, columns), device)
        train_labels_N, test_labels_M = train_labels_N.to(device), test_labels_M[mine_M].to(device)
        for keys_BK, labels_B in zip(neighbours, test_labels_M.split(rows)):
            votes_BC = _votes(keys_BK, train_labels_N, temperature, num_classes)
            hits += count_hits(votes_BC, labels_B, above=0)
    if world_size > 1:
        dist.all_reduce(hits)
    top1, top5 = accuracy(hits, len(test_MF))
    return KnnResult(top1, top5, kept, k, temperature, num_classes)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products in true float32: neither an autocast nor TF32 that training left switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(k: int, temperature: float, num_train: int) -> None:
    if not 1 <= k <= _MAX_K:
        raise ConfigError(f"k={k} neighbours: choose 1 to {_MAX_K}")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: choose one above 0 (0.07 is usual)")
    if num_train > _LOW_WORD:
        raise ConfigError(f"{num_train} training samples: nearest neighbours take {_LOW_WORD}")


def _share_of_blocks(num_test: int, rows: int, rank: int, world_size: int) -> torch.Tensor:
    """Test samples that this rank classifies: every ``world_size``-th block of the one division.

    The division into blocks does not depend on the world size, so neither does the rounding of a
    similarity.
    """
    blocks = torch.arange(num_test).split(rows)[rank::world_size]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.int64)


def _nearest(
    train_NF: torch.Tensor,
    test_MF: torch.Tensor,
    k: int,
    block: tuple[int, int],
    device: torch.device,
) -> list[torch.Tensor]:
    """Keys of the ``k`` nearest training samples of each test sample, best first, by test block.

    The training set is outermost: it crosses to the device once.
    """
    rows, columns = block
    tests = [_unit(x_BF, device) for x_BF in test_MF.split(rows)]
    best: list[torch.Tensor] = [
        torch.empty(len(x_BF), 0, dtype=torch.int64, device=device) for x_BF in tests
    ]
    for first in range(0, len(train_NF), columns):
        train_TF = _unit(train_NF[first : first + columns], device)
        for i, test_BF in enumerate(tests):
            keys_BT = _sortable(test_BF @ train_TF.T, first)
            keys_BT = keys_BT.topk(min(k, keys_BT.shape[1])).values
            merged = torch.cat([best[i], keys_BT], dim=1)
            best[i] = merged.topk(min(k, merged.shape[1])).values
    return best


def _unit(x_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    return nn.functional.normalize(x_NF.to(device, torch.float32), dim=1)


def _sortable(similarity_BT: torch.Tensor, first: int) -> torch.Tensor:
    """One int64 per pair that sorts by similarity, then by the lower training index.

    The high word is the float's bits, made to sort as integers; the low word counts down. Keys are
    unique, so even a top-k that breaks ties as it likes has one answer.
    """
    bits = (similarity_BT + 0.0).view(torch.int32)  # + 0.0: -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index_T = torch.arange(first, first + bits.shape[1], device=bits.device)
    return (ordered.long() << 32) | (_LOW_WORD - index_T)


def _read(keys_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities (float32) and training indices (int64) of keys."""
    ordered = (keys_BK >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_WORD - (keys_BK & _LOW_WORD)


def _votes(
    keys_BK: torch.Tensor, train_labels_N: torch.Tensor, temperature: float, num_classes: int
) -> torch.Tensor:
    """Fixed-point votes int64 (B, C); 0 only for classes without a neighbour."""
    similarity_BK, index_BK = _read(keys_BK)
    # Relative to the nearest neighbour: a factor per row, which no ranking sees.
    exponent_BK = (similarity_BK.double() - similarity_BK[:, :1].double()) / temperature
    vote_BK = (exponent_BK.exp() * _VOTE_SCALE).round().long().clamp_min(1)
    votes_BC = torch.zeros(len(keys_BK), num_classes, dtype=torch.int64, device=keys_BK.device)
    return votes_BC.scatter_add_(1, train_labels_N[index_BK], vote_BK)
