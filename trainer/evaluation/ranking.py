"""How good is an order: average precision and recall at k of ranked neighbours.

Shape suffixes: N images that are searched, M queries, B queries of a block, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.features.extraction import Features
from trainer.features.neighbours import full_float32, unit_rows

_BLOCK_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 26}  # sorted at once; about 40 bytes each


@dataclass(frozen=True)
class Ranking:
    """Measures over all queries that have at least one image of their class to be found."""

    mean_average_precision: float
    recall_at: dict[int, float]
    """Share of queries with an image of their class among the k nearest (Jégou et al. 2011)."""
    precision_at: dict[int, float]
    """Mean share of the k nearest that are of the query's class."""
    queries: int
    left_out: int
    """Queries without a label or without an image of their class."""


@torch.no_grad()
def rank_all(
    bank: Features,
    asked: Features,
    ks: Sequence[int],
    *,
    itself_M: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Ranking | None:
    """Order all images by cosine similarity to each query, and judge the orders.

    Average precision is the mean, over a query's relevant images, of the precision at each one's
    place. Images of equal similarity come in their order.

    Args:
        bank: what is searched; without a label it is relevant to no query.
        asked: what asks; without a label the query is left out.
        ks: for recall and precision; those above the number of images to be found are left out.
        itself_M: place of each query, not its own neighbour, in the bank; -1 where it is not there.
        device: where to compare.

    Returns:
        ``None`` where no query has anything to be found.
    """
    device = torch.device(device)
    counts, bank_labels_N = len(bank.labels_N), bank.labels_N.to(device)
    ks = [k for k in ks if k <= counts - (itself_M is not None)]
    sums = torch.zeros(1 + 2 * len(ks), dtype=torch.float64, device=device)
    judged = 0
    rows = max(1, _BLOCK_PAIRS.get(device.type, 1 << 22) // counts)
    with full_float32(device):
        bank_NF = unit_rows(bank.features_NF, device)
        for first in range(0, len(asked.labels_N), rows):
            part = slice(first, first + rows)
            similarity_BN = unit_rows(asked.features_NF[part], device) @ bank_NF.T
            if itself_M is not None:  # a query's own place comes last
                itself_B = itself_M[part].to(device)
                known = (itself_B >= 0).nonzero()[:, 0]
                similarity_BN[known, itself_B[known]] = -2.0  # below every cosine
            order_BN = similarity_BN.sort(dim=1, descending=True, stable=True).indices
            labels_B1 = asked.labels_N[part].to(device)[:, None]
            hit_BN = (bank_labels_N[order_BN] == labels_B1) & (labels_B1 >= 0)
            if itself_M is not None:
                hit_BN &= order_BN != itself_B[:, None]
            hit_BN = hit_BN[hit_BN.any(dim=1)]
            judged += len(hit_BN)
            sums += _measures(hit_BN, ks)
    if not judged:
        return None
    mean, *at = (sums / judged).tolist()
    recalls, precisions = dict(zip(ks, at)), dict(zip(ks, at[len(ks) :]))
    return Ranking(mean, recalls, precisions, judged, len(asked.labels_N) - judged)


def _measures(hit_BN: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """Sums over queries of average precision, recall at each k, precision at each k: float64."""
    found_BN = hit_BN.cumsum(dim=1)
    place_N = torch.arange(1, hit_BN.shape[1] + 1, device=hit_BN.device)
    precision_BN = (found_BN / place_N.double()).masked_fill_(~hit_BN, 0.0)
    sums = [(precision_BN.sum(dim=1) / hit_BN.sum(dim=1)).sum()]
    sums += [hit_BN[:, :k].any(dim=1).sum().double() for k in ks]
    sums += [hit_BN[:, :k].double().mean(dim=1).sum() for k in ks]
    return torch.stack(sums)
