"""Spherical k-means of rows that every process holds; each assigns its share of them.

Shapes: S rows, D dimensions, K clusters.
"""

import torch
import torch.distributed as dist

from common.collectives import gather_rows, rank_and_size, waiting
from kernels.ntxent.reference import unit_rows
from trainer.features.k_means import cluster_sums

_BLOCK = 1 << 24  # similarities at a time


@torch.no_grad()
def spherical_k_means(
    rows_SD: torch.Tensor, centres_KD: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of unit length, and the one that each row is most similar to. A collective.

    What travels is each cluster's count and sum. A cluster that loses all its rows keeps its
    centre, as in the code of DeepCluster-v2 (arXiv 2006.09882).

    Args:
        rows_SD: unit rows, the same on every process.
        centres_KD: unit rows to begin with, the same on every process.
        iterations: of Lloyd's; 0 assigns only.

    Returns:
        ``(K, D)`` in the rows' dtype and int64 ``(S,)``, equal on all processes.
    """
    rank, size = rank_and_size()
    share = -(-len(rows_SD) // size)
    own_SD = rows_SD[rank * share : (rank + 1) * share]
    for _ in range(iterations):
        assigned = _nearest(own_SD, centres_KD)
        sums_KD, counts_K = cluster_sums(own_SD, assigned, len(centres_KD))
        sums_KE = torch.cat([sums_KD, counts_K[:, None].double()], 1)  # one tensor, one collective
        if size > 1:
            with waiting("clusters: all-reduce of sums and counts"):
                dist.all_reduce(sums_KE)
        means_KD = unit_rows(sums_KE[:, :-1]).to(centres_KD.dtype)
        centres_KD = torch.where(sums_KE[:, -1:] > 0, means_KD, centres_KD)
    assigned = _nearest(own_SD, centres_KD)
    padded = torch.cat([assigned, assigned.new_zeros(share - len(assigned))])
    return centres_KD, gather_rows(padded)[: len(rows_SD)]


def _nearest(rows_SD: torch.Tensor, centres_KD: torch.Tensor) -> torch.Tensor:
    """The first of equally near centres, a block of similarities at a time."""
    parts = rows_SD.split(max(1, _BLOCK // len(centres_KD)))
    found = [(part @ centres_KD.T).argmax(1) for part in parts]
    return torch.cat([rows_SD.new_empty(0, dtype=torch.int64), *found])
