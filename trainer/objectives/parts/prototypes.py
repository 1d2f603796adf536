"""Prototypes that are learnt, and how a batch is shared out among them.

Caron et al. 2020 (SwAV, arXiv 2006.09882). Shapes: N images of this process, R rows, Q rows that
are the same on all processes, K prototypes, D dimensions.
"""

import torch
from torch import nn

from kernels.ntxent.reference import unit_rows
from trainer.objectives.parts.global_sum import global_sum
from trainer.optim.sharded_norms import whole


class Prototypes(nn.Module):
    """K directions: of each row of weights its direction alone counts.

    Args:
        count: K.
        dim: D.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(unit_rows(torch.randn(count, dim)))

    def forward(self, unit_RD: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Cosines ``(R, K)`` in float32 or better. Frozen, directions get a gradient of zero."""
        weight_KD: torch.Tensor = self.weight
        if frozen:  # DDP waits for a gradient of every parameter
            weight_KD = weight_KD.detach() + 0 * weight_KD
        with torch.autocast(unit_RD.device.type, enabled=False):
            return unit_RD @ unit_rows(weight_KD).T

    @torch.no_grad()
    def of(self, unit_QD: torch.Tensor) -> torch.Tensor:
        """Cosines ``(Q, K)`` without gradient, also where processes hold pieces. A collective."""
        return unit_QD @ unit_rows(whole(self.weight)).T


@torch.no_grad()
def sinkhorn(
    cosines_NK: torch.Tensor,
    epsilon: float,
    iterations: int,
    queued_QK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes ``(N, K)``, float64: rows of sum 1, so that prototypes get about equal shares of all
    processes' images (Cuturi 2013; algorithm of SwAV's appendix A.1). A collective for each
    iteration, of K numbers.

    Args:
        cosines_NK: from -1 to 1, of this process's images.
        epsilon: the smoothness; 0.003 or more, or float64 could not hold all of the shares.
        iterations: of dividing by prototypes' sums and then by images'.
        queued_QK: of rows that take part, the same on all processes.
    """
    # Cosines end at 1; what is taken off all of them changes nothing.
    parts = [cosines_NK] if queued_QK is None else [cosines_NK, queued_QK]
    shares = [((each.double() - 1) / epsilon).exp() for each in parts]
    for _ in range(iterations):
        sums_K = global_sum(shares[0].sum(0))
        for queued in shares[1:]:
            sums_K = sums_K + queued.sum(0)
        for share in shares:
            share /= sums_K
            share /= share.sum(1, keepdim=True)
    return shares[0]
