"""k-means of rows of which every process holds its own: each cluster's count and sum is all that
travels.

Shapes: R rows of this process, D dimensions, K clusters, P groups of G clusters.
"""

import torch

from kernels.ntxent.reference import unit_rows
from trainer.features.k_means import cluster_sums
from trainer.objectives.parts.global_sum import global_sum

_BLOCK = 1 << 19, 1 << 26  # similarities at a time: what a cache holds, what fills a GPU
_GROUP = 64  # centres


@torch.no_grad()
def k_means(
    own_RD: torch.Tensor, centres_KD: torch.Tensor, iterations: int, *, spherical: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres, and the nearest one of each of this process's rows. A collective.

    A cluster that loses all its rows keeps its centre, as in the code of DeepCluster-v2
    (arXiv 2006.09882).

    Args:
        own_RD: this process's rows, any number of them.
        centres_KD: to begin with, the same on every process.
        iterations: of Lloyd's; 0 assigns only.
        spherical: rows and centres have unit length; a centre is the direction of its rows' sum
            and not their mean.

    Returns:
        ``(K, D)`` in the rows' dtype, equal on all processes, and int64 ``(R,)``.
    """
    for _ in range(iterations):
        sums_KD, counts_K = cluster_sums(
            own_RD, nearest(own_RD, centres_KD, spherical=spherical), len(centres_KD)
        )
        # One tensor, one collective.
        sums_KE = global_sum(torch.cat([sums_KD, counts_K[:, None].double()], 1))
        sums_KD, counts_K1 = sums_KE[:, :-1], sums_KE[:, -1:]
        new_KD = unit_rows(sums_KD) if spherical else sums_KD / counts_K1.clamp_min(1)
        centres_KD = torch.where(counts_K1 > 0, new_KD.to(centres_KD.dtype), centres_KD)
    return centres_KD, nearest(own_RD, centres_KD, spherical=spherical)


def nearest(
    rows_RD: torch.Tensor, centres_KD: torch.Tensor, *, spherical: bool = False
) -> torch.Tensor:
    """The first of equally near centres, a block of similarities at a time: int64 ``(R,)``.

    An argmax of long rows is slow on a CPU, a maximum is not: first which ``G`` neighbouring
    centres have the largest similarity, then which one of them.
    """
    groups = -(-len(centres_KD) // _GROUP)
    count = max(1, _BLOCK[rows_RD.is_cuda] // (groups * _GROUP))
    block_BK = rows_RD.new_full((min(count, len(rows_RD)), groups * _GROUP), -torch.inf)
    minus_half_K = centres_KD.square().sum(1) / -2  # of unit length: the same for all
    nearest_R = torch.empty(len(rows_RD), dtype=torch.int64, device=rows_RD.device)
    for part_BD, into_B in zip(rows_RD.split(count), nearest_R.split(count)):
        similarity_BK = block_BK[: len(part_BD), : len(centres_KD)]
        torch.mm(part_BD, centres_KD.T, out=similarity_BK)
        if not spherical:
            similarity_BK += minus_half_K
        grouped_BPG = block_BK[: len(part_BD)].unflatten(1, (groups, _GROUP))
        group_B1 = grouped_BPG.amax(2).argmax(1, keepdim=True)
        within_BG = grouped_BPG.take_along_dim(group_B1[..., None], 1)[:, 0]
        into_B.copy_(group_B1[:, 0] * _GROUP + within_BG.argmax(1))
    return nearest_R
