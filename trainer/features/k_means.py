"""k-means: Lloyd 1982, started by k-means++ (Arthur & Vassilvitskii 2007).

Deterministic: the draws come from the counter generator, sums are float64 products in one order.

Shape suffixes: N samples, F features, K clusters, B samples of a block.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from trainer.features.neighbours import full_float32

_MAX_ITERATIONS = 300
_BLOCK_BYTES = 256 << 20  # of distances and one-hot rows at once


@dataclass(frozen=True)
class Clustering:
    """The best of several starts."""

    assigned_N: torch.Tensor  # noqa: N815
    """int64 on the CPU: each sample's cluster."""
    centres_KF: torch.Tensor  # noqa: N815
    distance_N: torch.Tensor  # noqa: N815
    """Squared distance of each sample to its centre, float64 on the CPU."""
    iterations: int
    converged: bool
    """Whether the last iteration moved no sample."""

    @property
    def found(self) -> int:
        """Clusters that have samples: fewer than asked for where fewer samples differ."""
        return len(self.assigned_N.unique())

    @property
    def inertia(self) -> float:
        """Sum of the squared distances, what k-means makes small."""
        return float(self.distance_N.sum())


@torch.no_grad()
def k_means(
    x_NF: torch.Tensor,
    clusters: int,
    *,
    seed: int = 0,
    restarts: int = 10,
    device: torch.device | str = "cpu",
) -> Clustering:
    """Partition rows into clusters around their means: of ``restarts`` that with least inertia.

    Rows are compared in float32 on ``device``, averaged in float64.

    Raises:
        ConfigError: there are fewer samples than clusters.
    """
    if not 1 <= clusters <= len(x_NF):
        raise ConfigError(f"--k {clusters} clusters of {len(x_NF)} samples: choose 1 to as many")
    device = torch.device(device)
    with full_float32(device):
        x_NF = x_NF.to(device, torch.float32)
        found = (_lloyd(x_NF, _plus_plus(x_NF, clusters, seed, start)) for start in range(restarts))
        return min(found, key=lambda each: each.inertia)


def _plus_plus(x_NF: torch.Tensor, clusters: int, seed: int, start: int) -> torch.Tensor:
    """Centres drawn one after the other, with chances as the squared distance to the nearest."""
    draws = uniforms(sample_keys(seed, start, np.arange(clusters), 0, Stream.ORDER)).tolist()
    chosen = [int(draws[0] * len(x_NF))]
    nearest_N = torch.full((len(x_NF),), math.inf, dtype=torch.float64, device=x_NF.device)
    for draw in draws[1:]:
        new_N = (x_NF - x_NF[chosen[-1]]).square().sum(dim=1, dtype=torch.float64)
        nearest_N = torch.minimum(nearest_N, new_N)
        reach_N = nearest_N.cpu().cumsum(dim=0)  # on the CPU: one order of additions
        place = int(torch.searchsorted(reach_N, draw * float(reach_N[-1]), right=True))
        chosen.append(min(place, len(x_NF) - 1))
    return x_NF[chosen]


def _lloyd(x_NF: torch.Tensor, centres_KF: torch.Tensor) -> Clustering:
    assigned_N, distance_N = _assign(x_NF, centres_KF)
    iteration, moved = 0, True
    while moved and iteration < _MAX_ITERATIONS:
        centres_KF = _means(x_NF, assigned_N, distance_N, len(centres_KF))
        before_N = assigned_N
        assigned_N, distance_N = _assign(x_NF, centres_KF)
        iteration, moved = iteration + 1, not torch.equal(assigned_N, before_N)
    return Clustering(
        assigned_N.cpu(), centres_KF.cpu(), distance_N.cpu(), iteration, converged=not moved
    )


def _rows(x_NF: torch.Tensor, clusters: int) -> int:
    return max(1, _BLOCK_BYTES // (12 * clusters + 12 * x_NF.shape[1]))


def _assign(x_NF: torch.Tensor, centres_KF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's nearest centre, the first of equally near ones, and its squared distance."""
    half_K = 0.5 * centres_KF.square().sum(dim=1)
    assigned, distances = [], []
    for x_BF in x_NF.split(_rows(x_NF, len(centres_KF))):
        nearest_B = (half_K - x_BF @ centres_KF.T).argmin(dim=1)
        assigned.append(nearest_B)
        # Not from the product above: it would cancel where a sample lies on its centre.
        difference_BF = x_BF - centres_KF[nearest_B]
        distances.append(difference_BF.square().sum(dim=1, dtype=torch.float64))
    return torch.cat(assigned), torch.cat(distances)


def cluster_sums(
    x_NF: torch.Tensor, assigned_N: torch.Tensor, clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the samples of each cluster, float64 ``(K, F)``, and their counts, int64 ``(K,)``.

    One order of additions: on the CPU that of the samples; on a GPU, where atomic additions have
    none, that of products of matrices.
    """
    sums_KF = torch.zeros(clusters, x_NF.shape[1], dtype=torch.float64, device=x_NF.device)
    rows = _rows(x_NF, clusters)
    for x_BF, assigned_B in zip(x_NF.split(rows), assigned_N.split(rows)):
        if x_NF.is_cuda:
            sums_KF += nn.functional.one_hot(assigned_B, clusters).double().T @ x_BF.double()
        else:
            sums_KF.index_add_(0, assigned_B, x_BF.double())
    return sums_KF, assigned_N.bincount(minlength=clusters)


def _means(
    x_NF: torch.Tensor, assigned_N: torch.Tensor, distance_N: torch.Tensor, clusters: int
) -> torch.Tensor:
    """Centres of the clusters; one that lost all its samples starts anew at the worst placed."""
    sums_KF, counts_K = cluster_sums(x_NF, assigned_N, clusters)
    centres_KF = (sums_KF / counts_K.clamp_min(1)[:, None]).float()
    empty = (counts_K == 0).nonzero()[:, 0]
    if len(empty):
        worst = distance_N.sort(descending=True, stable=True).indices[: len(empty)]
        centres_KF[empty] = x_NF[worst]
    return centres_KF
