"""More weight for rare hues (Zhang et al. 2016, arXiv 1603.08511), by what a run has shown so far.

Shapes: N images of this process, h and w pixels, Q cells of hues.
"""

import torch
import torch.distributed as dist
from torch import nn

from common.collectives import rank_and_size, waiting
from trainer.objectives.parts.lab import HueCells

_SPREAD = 5.0  # deviation of the Gaussian that smooths counts of cells, in units of a and b


class HueWeights(nn.Module):
    """Counts of cells, a buffer that checkpoints hold, and weights made of them.

    Args:
        cells: Q of them.
        uniform: share of a uniform distribution in that by whose inverse cells are weighted.
    """

    counts: torch.Tensor

    def __init__(self, cells: HueCells, uniform: float) -> None:
        super().__init__()
        self.uniform = uniform
        self.register_buffer("counts", torch.zeros(len(cells), dtype=torch.int64))
        squares_QQ = torch.cdist(cells.centres_Q2, cells.centres_Q2).square()
        near_QQ = (-squares_QQ / (2 * _SPREAD**2)).exp()
        self._smoothing_QQ = near_QQ / near_QQ.sum(0)

    def forward(self) -> torch.Tensor:
        """Of cells, ``(Q,)``: their mean over the pixels so far is 1; at first each is."""
        counts_Q = self.counts.float()
        self._smoothing_QQ = self._smoothing_QQ.to(counts_Q.device)
        shares_Q = self._smoothing_QQ @ counts_Q / counts_Q.sum().clamp_min(1)
        inverse_Q = 1 / ((1 - self.uniform) * shares_Q + self.uniform / len(shares_Q))
        weights_Q: torch.Tensor = inverse_Q / (shares_Q * inverse_Q).sum()
        return torch.where(counts_Q.sum() == 0, torch.ones_like(weights_Q), weights_Q)

    @torch.no_grad()
    def add(self, cells_Nhw: torch.Tensor, shown_Nhw: torch.Tensor) -> None:
        """Count the pixels of all processes that are shown: integers, whose sum has no order. A
        collective."""
        counts_Q = torch.zeros_like(self.counts)
        counts_Q.index_add_(0, cells_Nhw.flatten(), shown_Nhw.flatten().long())
        if rank_and_size()[1] > 1:
            with waiting("counts of hues: all-reduce"):
                dist.all_reduce(counts_Q)
        self.counts += counts_Q
