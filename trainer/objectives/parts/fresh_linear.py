"""A linear layer that starts anew in the middle of a run.

Its parameters are not written to, because sharded strategies and their optimizers keep copies of
them; what is taken off them is. Shapes: R rows, F features, K outputs.
"""

import torch
from torch import nn
from torch.nn.functional import linear

from trainer.optim.sharded_norms import whole


class FreshLinear(nn.Module):
    """``(R, F) -> (R, K)``, of what its parameters have become since the last start.

    Args:
        features: F.
        outputs: K.
    """

    weight_offset: torch.Tensor
    bias_offset: torch.Tensor

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, features))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("weight_offset", torch.zeros(outputs, features))
        self.register_buffer("bias_offset", torch.zeros(outputs))

    def forward(self, rows_RF: torch.Tensor) -> torch.Tensor:
        """Outputs ``(R, K)``."""
        weight_KF = self.weight + self.weight_offset
        return linear(rows_RF, weight_KF, self.bias + self.bias_offset)

    @torch.no_grad()
    def start(self, weight_KF: torch.Tensor) -> None:
        """Begin with these weights and a bias of 0. A collective where parameters are sharded."""
        self.weight_offset.copy_(weight_KF - whole(self.weight))
        self.bias_offset.copy_(-whole(self.bias))
