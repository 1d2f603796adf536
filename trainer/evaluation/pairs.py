"""Pairs of samples from lists of nearest neighbours: near-identical ones, and likely classmates.

Shape suffixes: N samples, K neighbours of each, P pairs.
"""

import functools
from dataclasses import dataclass

import torch

from trainer.features.neighbours import nearest_rows

_ROWS = 1 << 14  # pairs whose lists are compared at once


@dataclass(frozen=True)
class Neighbourhoods:
    """The nearest other samples of each sample, nearest first."""

    index_NK: torch.Tensor  # int64  # noqa: N815
    similarity_NK: torch.Tensor  # float32, cosine  # noqa: N815

    @functools.cached_property
    def pairs(self) -> "Pairs":
        """Every pair that is in some list, once."""
        count, width = self.index_NK.shape
        asker_P = torch.arange(count).repeat_interleave(width)
        ends_P2 = torch.stack([asker_P, self.index_NK.flatten()], dim=1).sort(dim=1).values
        key_P = ends_P2[:, 0] * count + ends_P2[:, 1]
        unique, place_P = key_P.unique(return_inverse=True)
        # The two directions may differ in the last bit: the larger one counts.
        similarity = torch.full((len(unique),), -2.0).scatter_reduce(
            0, place_P, self.similarity_NK.flatten(), "amax"
        )
        samples = torch.stack([unique // count, unique % count], dim=1)
        return Pairs(samples, similarity, shared_neighbours(self, samples))


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples, the lower number first, the most alike pair first."""

    samples_P2: torch.Tensor  # int64  # noqa: N815
    similarity_P: torch.Tensor  # float32, cosine  # noqa: N815
    shared_P: torch.Tensor  # float64, 0 to 1: see shared_neighbours  # noqa: N815

    def __len__(self) -> int:
        return len(self.samples_P2)

    def take(self, which: torch.Tensor) -> "Pairs":
        """The pairs at ``which``."""
        return Pairs(self.samples_P2[which], self.similarity_P[which], self.shared_P[which])


def neighbourhoods(
    features_NF: torch.Tensor,
    k: int,
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Neighbourhoods:
    """The ``min(k, N - 1)`` nearest others of every sample. A collective above one process."""
    count = len(features_NF)
    similarity, index = nearest_rows(
        features_NF, features_NF, k + 1, device=device, rank=rank, world_size=world_size
    )
    # Of many equal samples, a sample's list may not hold itself: then it loses its last instead.
    itself = index == torch.arange(count)[:, None]
    order = itself.int().argsort(dim=1, stable=True)[:, : index.shape[1] - 1]
    return Neighbourhoods(index.gather(1, order), similarity.gather(1, order))


def near_identical(found: Neighbourhoods, threshold: float) -> Pairs:
    """Pairs of which one has the other among its neighbours, at a similarity of ``threshold``."""
    near = found.pairs.similarity_P >= threshold
    return _sorted(found.pairs.take(near), by_shared=False)


def likely_classmates(found: Neighbourhoods, below: float, least_shared: float) -> Pairs:
    """Pairs that have each other, and ``least_shared`` of their neighbours, in common.

    A contrastive loss pushes them apart as negatives though they show the same thing: candidates
    for false negatives. Pairs of a similarity of ``below`` or more are left out: near-identical.
    """
    pairs = found.pairs
    pairs = pairs.take((pairs.similarity_P < below) & _mutual(found, pairs.samples_P2))
    return _sorted(pairs.take(pairs.shared_P >= least_shared), by_shared=True)


def groups(samples_P2: torch.Tensor) -> list[list[int]]:
    """Samples that pairs connect, each group ascending, the largest first."""
    parent: dict[int, int] = {}

    def root(sample: int) -> int:
        while (above := parent.setdefault(sample, sample)) != sample:
            parent[sample] = parent[above]  # halve the way
            sample = above
        return sample

    for first, second in samples_P2.tolist():
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for sample in sorted(parent):
        members.setdefault(root(sample), []).append(sample)
    return sorted(members.values(), key=lambda group: (-len(group), group))


def _mutual(found: Neighbourhoods, samples_P2: torch.Tensor) -> torch.Tensor:
    """Whether each of a pair has the other in its list."""
    first_P, second_P = samples_P2.T
    there = (found.index_NK[first_P] == second_P[:, None]).any(dim=1)
    return there & (found.index_NK[second_P] == first_P[:, None]).any(dim=1)


def shared_neighbours(found: Neighbourhoods, samples_P2: torch.Tensor) -> torch.Tensor:
    """Jaccard index of both neighbourhoods, each with its own sample in it: float64 (P,)."""
    own_N1 = torch.arange(len(found.index_NK))[:, None]
    whole_NK = torch.cat([own_N1, found.index_NK], dim=1)
    width, parts = whole_NK.shape[1], []
    for pairs in samples_P2.split(_ROWS):
        first_PK, second_PK = whole_NK[pairs[:, 0]], whole_NK[pairs[:, 1]]
        common_P = (first_PK[:, :, None] == second_PK[:, None, :]).any(dim=2).sum(dim=1)
        parts.append(common_P.double() / (2 * width - common_P))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _sorted(pairs: Pairs, *, by_shared: bool) -> Pairs:
    order = pairs.similarity_P.sort(descending=True, stable=True).indices
    if by_shared:
        order = order[pairs.shared_P[order].sort(descending=True, stable=True).indices]
    return pairs.take(order)
