"""Each row's rival: its largest logit but its positive's. Shapes: m x n a tile of logits.

A row is told from its negatives ("top-1 accuracy of the contrastive task") where its positive's
logit is larger than its rival's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def told_apart(
    positive_M: torch.Tensor, rival_M: torch.Tensor | None, lse_M: torch.Tensor
) -> torch.Tensor:
    """1 for rows whose positive's logit is the larger one, else 0; all 0 without rivals.

    No row of a NaN is told apart: Triton's maxima pass over NaN where torch's keep it.
    """
    if rival_M is None:
        return torch.zeros_like(lse_M)
    return ((positive_M > rival_M) & ~lse_M.isnan()).to(lse_M.dtype)


@contextmanager
def without_positives(
    logits_mn: torch.Tensor, positive_m: torch.Tensor, first_column: int
) -> Iterator[torch.Tensor]:
    """The same tile with the positives' logits at minus infinity, and back as it was afterwards.

    Writes and restores ``m`` numbers instead of masking a copy of the tile, and waits for none.

    Args:
        logits_mn: the tile.
        positive_m: int64, the column of each row's positive; one outside of the tile is none of it.
        first_column: the tile's first.
    """
    index_m1 = (positive_m - first_column)[:, None]
    inside_m1 = (index_m1 >= 0) & (index_m1 < logits_mn.shape[1])
    index_m1 = index_m1.clamp(0, logits_mn.shape[1] - 1)
    kept_m1 = logits_mn.gather(1, index_m1)
    logits_mn.scatter_(1, index_m1, kept_m1.masked_fill(inside_m1, float("-inf")))
    yield logits_mn
    logits_mn.scatter_(1, index_m1, kept_m1)
