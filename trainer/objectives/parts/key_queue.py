"""The keys of past batches, a ring of K rows (He et al. 2020, arXiv 1911.05722).

Shapes: K rows of the queue, B keys of the global batch, N of them that are kept, D dimensions.
"""

import torch
from torch import nn

from kernels.ntxent.reference import unit_rows


class KeyQueue(nn.Module):
    """K unit rows, equal on all processes as long as all push the same.

    It starts with random directions from torch's generator, which the run's seed decides. Rows and
    place are buffers: a checkpoint holds them, and they follow the model to its device and dtype.
    DDP does not broadcast them in a step: the strategy turns that off for all buffers.

    Args:
        size: K, 1 or more; no relation to the batch is needed.
        dim: D.
    """

    rows: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", unit_rows(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys_BD: torch.Tensor, skipped: torch.Tensor) -> None:
        """Replace the oldest rows, going on at the front past the end; the host does not wait.

        Args:
            keys_BD: unit rows of the global batch in the order of its samples, the same on all
                processes. Of more than K the last K are kept, where one by one would put them.
            skipped: 0-d; where it is 1, nothing changes.
        """
        size, count = len(self.rows), len(keys_BD)
        newest_ND = keys_BD[-size:].to(self.rows.dtype)
        first = count - len(newest_ND)
        places = torch.arange(first, count, device=self.rows.device).add_(self.position) % size
        left_out = skipped > 0
        self.rows.index_copy_(0, places, torch.where(left_out, self.rows[places], newest_ND))
        self.position.copy_(torch.where(left_out, self.position, (self.position + count) % size))
