"""Pairs of samples from lists of nearest neighbours: near-identical ones, and likely classmates.

Shape suffixes: N samples, K neighbours of each, P pairs.
"""

from dataclasses import dataclass

import torch

from trainer.features.neighbours import nearest_rows

_ROWS = 1 << 14  # pairs whose lists are compared at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of which one has the other among its neighbours, the lower number first."""

    samples_P2: torch.Tensor  # int64  # noqa: N815
    similarity_P: torch.Tensor  # float32, cosine  # noqa: N815
    shared_P: torch.Tensor  # float64, 0 to 1: see shared_neighbours  # noqa: N815
    mutual_P: torch.Tensor  # bool: each has the other  # noqa: N815

    def __len__(self) -> int:
        return len(self.samples_P2)

    def take(self, which: torch.Tensor) -> "Pairs":
        """The pairs at ``which``."""
        columns = self.samples_P2, self.similarity_P, self.shared_P, self.mutual_P
        return Pairs(*(column[which] for column in columns))


def neighbourhoods(
    features_NF: torch.Tensor,
    k: int,
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``min(k, N - 1)`` nearest others of every sample. A collective above one process.

    Returns:
        Similarities float32 (N, K) and indices int64 (N, K), nearest first.
    """
    count = len(features_NF)
    similarity, index = nearest_rows(
        features_NF, features_NF, k + 1, device=device, rank=rank, world_size=world_size
    )
    # Of many equal samples, a sample's list may not hold itself: then it loses its last instead.
    itself = index == torch.arange(count)[:, None]
    order = itself.int().argsort(dim=1, stable=True)[:, : index.shape[1] - 1]
    return similarity.gather(1, order), index.gather(1, order)


def pairs_of(similarity_NK: torch.Tensor, index_NK: torch.Tensor) -> Pairs:
    """Every pair that is in some list of :func:`neighbourhoods`, once."""
    count, width = index_NK.shape
    asker_P = torch.arange(count).repeat_interleave(width)
    ends_P2 = torch.stack([asker_P, index_NK.flatten()], dim=1).sort(dim=1).values
    key_P = ends_P2[:, 0] * count + ends_P2[:, 1]
    unique_P, place_P, lists_P = key_P.unique(return_inverse=True, return_counts=True)
    # The two directions may differ in the last bit: the larger one counts.
    similarity_P = torch.full((len(unique_P),), -2.0).scatter_reduce(
        0, place_P, similarity_NK.flatten(), "amax"
    )
    samples_P2 = torch.stack([unique_P // count, unique_P % count], dim=1)
    return Pairs(samples_P2, similarity_P, shared_neighbours(index_NK, samples_P2), lists_P == 2)


def near_identical(pairs: Pairs, threshold: float) -> Pairs:
    """Pairs at a similarity of ``threshold``, the most alike first."""
    return _most_alike_first(pairs.take(pairs.similarity_P >= threshold))


def likely_classmates(pairs: Pairs, below: float, least_shared: float) -> Pairs:
    """Mutual pairs that have ``least_shared`` of their neighbours in common, most of them first.

    A contrastive loss pushes them apart as negatives though they show the same thing: candidates
    for false negatives. Pairs of a similarity of ``below`` or more are left out: near-identical.
    """
    alike = pairs.mutual_P & (pairs.similarity_P < below) & (pairs.shared_P >= least_shared)
    found = _most_alike_first(pairs.take(alike))
    return found.take(found.shared_P.sort(descending=True, stable=True).indices)


def _most_alike_first(pairs: Pairs) -> Pairs:
    return pairs.take(pairs.similarity_P.sort(descending=True, stable=True).indices)


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


def shared_neighbours(index_NK: torch.Tensor, samples_P2: torch.Tensor) -> torch.Tensor:
    """Jaccard index of both neighbourhoods, each with its own sample in it: float64 (P,)."""
    own_N1 = torch.arange(len(index_NK))[:, None]
    whole_NK = torch.cat([own_N1, index_NK], dim=1)
    width, parts = whole_NK.shape[1], []
    for pairs in samples_P2.split(_ROWS):
        first_PK, second_PK = whole_NK[pairs[:, 0]], whole_NK[pairs[:, 1]]
        common_P = (first_PK[:, :, None] == second_PK[:, None, :]).any(dim=2).sum(dim=1)
        parts.append(common_P.double() / (2 * width - common_P))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
