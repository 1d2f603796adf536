"""A row for every sample of the data set: memory banks and their like.

Shapes: S samples of the data set, N images of this process.
"""

import torch
from torch import nn

from common.collectives import gather_rows


class PerSample(nn.Module):
    """Rows addressed by sample id, whole and equal on every process.

    They are a buffer: a checkpoint holds them in the order of ids, so that any number of processes
    goes on from it, and DDP does not broadcast them, because the strategy turns that off.

    Args:
        rows: ``(S, ...)``, as they are before the first write.
    """

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    @torch.no_grad()
    def write(
        self,
        ids_N: torch.Tensor,
        new_N: torch.Tensor,
        genuine_N: torch.Tensor,
        skipped: torch.Tensor | None = None,
    ) -> None:
        """Replace the rows of all processes' images. A collective; the host does not wait.

        Args:
            ids_N: int64 sample ids; no two of the global batch are alike.
            new_N: ``(N, ...)``, their rows.
            genuine_N: False where another image was shown in the sample's place: its row stays.
            skipped: 0-d; where it is 1, all rows stay.
        """
        ids, new, genuine = gather_rows(ids_N), gather_rows(new_N), gather_rows(genuine_N)
        replaced = genuine if skipped is None else genuine & (skipped == 0)
        replaced = replaced.view(-1, *[1] * (new.ndim - 1))
        kept = torch.where(replaced, new.to(self.rows.dtype), self.rows[ids])
        self.rows.index_copy_(0, ids, kept)
