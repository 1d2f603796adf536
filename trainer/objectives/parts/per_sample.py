"""A row for every sample of the data set: memory banks and their like.

Shapes: S samples of the data set, N images of this process, R of any samples.
"""

from typing import Literal

import torch
from torch import nn

from common.collectives import gather_rows

Bits = Literal[32, 16, 8]
_STEPS = 127  # of 8 bits, from 0 to 1


class PerSample(nn.Module):
    """Rows addressed by sample id, whole and equal on every process.

    They are a buffer: a checkpoint holds them in the order of ids, so that any number of processes
    goes on from it, and DDP does not broadcast them, because the strategy turns that off.

    Args:
        rows: ``(S, ...)`` from -1 to 1, as they are before the first write.
        bits: that a number takes. 32 are as precise as the run; 16 and 8 are kept as bytes, which
            no conversion of the model's floating-point numbers touches.
    """

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, bits: Bits = 32) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("rows", self._encoded(rows))

    def _encoded(self, rows: torch.Tensor) -> torch.Tensor:
        if self.bits == 16:
            return rows.half().contiguous().view(torch.int8)  # no backend sends int16
        return (rows * _STEPS).round().to(torch.int8) if self.bits == 8 else rows

    def read(self, ids_R: torch.Tensor | None = None) -> torch.Tensor:
        """``(R, ...)``: rows of these samples, or of all; float16 where they have 16 bits."""
        rows = self.rows if ids_R is None else self.rows[ids_R]
        if self.bits == 16:
            return rows.view(torch.float16)
        return rows.float() / _STEPS if self.bits == 8 else rows

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
            new_N: ``(N, ...)``, their rows, from -1 to 1.
            genuine_N: False where another image was shown in the sample's place: its row stays.
            skipped: 0-d; where it is 1, all rows stay.
        """
        encoded_N = self._encoded(new_N).to(self.rows.dtype)
        ids, new, genuine = gather_rows(ids_N), gather_rows(encoded_N), gather_rows(genuine_N)
        replaced = genuine if skipped is None else genuine & (skipped == 0)
        replaced = replaced.view(-1, *[1] * (new.ndim - 1))
        self.rows.index_copy_(0, ids, torch.where(replaced, new, self.rows[ids]))
