"""A small transformer that decodes all tokens of those that were seen (MAE).

Shapes: N images of this process, P patches, K of them seen, D the encoder's width, E the decoder's,
X numbers decoded of a patch.
"""

import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

HEAD = 32
"""Dimensions of an attention's head, as in the paper."""

_DEVIATION = 0.02  # of initial tokens


class TokenDecoder(nn.Module):
    """From tokens of the patches seen to numbers of all; places are learnt (the paper: sines).

    Args:
        inputs: D.
        width: E, a multiple of :data:`HEAD`.
        depth: blocks.
        patches: P.
        outputs: X.
    """

    def __init__(self, inputs: int, width: int, depth: int, patches: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(inputs, width)
        self.hidden = nn.Parameter(_DEVIATION * torch.randn(1, 1, width))
        self.places = nn.Parameter(_DEVIATION * torch.randn(1, 1 + patches, width))
        blocks = [EncoderBlock(width // HEAD, width, 4 * width, 0, 0) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width, eps=1e-6))
        self.outputs = nn.Linear(width, outputs)

    def forward(self, tokens_NKD: torch.Tensor, seen_NK: torch.Tensor) -> torch.Tensor:
        """``(N, P, X)`` from ``(N, 1 + K, D)``, the class's first, and where the others lie."""
        tokens_NKE = self.narrow(tokens_NKD)
        images, _, width = tokens_NKE.shape
        hidden_NPE = self.hidden.to(tokens_NKE.dtype).expand(images, self.places.shape[1] - 1, -1)
        into_NKE = seen_NK[..., None].expand(-1, -1, width)
        all_NPE = hidden_NPE.scatter(1, into_NKE, tokens_NKE[:, 1:])
        placed = torch.cat([tokens_NKE[:, :1], all_NPE], 1) + self.places
        decoded_NPX: torch.Tensor = self.outputs(self.blocks(placed)[:, 1:])
        return decoded_NPX
