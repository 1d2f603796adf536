"""A linear layer that starts anew in the middle of a run.

Its parameters are not written to, because sharded strategies and their optimizers keep copies of
them; what is taken off them is. There are two sets, which take turns: what an optimizer remembers
of one dies away, by gradients of zero, while the other learns.

Shapes: R rows, F features, K outputs.
"""

import torch
from torch import nn
from torch.nn.functional import linear

from trainer.optim.sharded_norms import whole


class FreshLinear(nn.Module):
    """``(R, F) -> (R, K)``, of what its parameters have become since the last start.

    Weight decay draws parameters to 0, and so the layer towards what was taken off.

    Args:
        features: F.
        outputs: K.
    """

    weight_offset: torch.Tensor
    bias_offset: torch.Tensor
    turn: torch.Tensor

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, outputs, features))
        self.bias = nn.Parameter(torch.zeros(2, outputs))
        self.register_buffer("weight_offset", torch.zeros(outputs, features))
        self.register_buffer("bias_offset", torch.zeros(outputs))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))

    def forward(self, rows_RF: torch.Tensor) -> torch.Tensor:
        """Outputs ``(R, K)``."""
        weight_KF, bias_K = self._present(self.weight), self._present(self.bias)
        return linear(rows_RF, weight_KF + self.weight_offset, bias_K + self.bias_offset)

    def _present(self, both: torch.Tensor) -> torch.Tensor:
        return torch.where(self.turn == 0, both[0], both[1])

    @torch.no_grad()
    def start(self, weight_KF: torch.Tensor) -> None:
        """Begin with these weights and a bias of 0. A collective where parameters are sharded."""
        self.turn.copy_(1 - self.turn)
        self.weight_offset.copy_(weight_KF - self._present(whole(self.weight)))
        self.bias_offset.copy_(-self._present(whole(self.bias)))
