"""A vision transformer that sees some of its tokens, and a small one that decodes all (MAE).

Shapes: N images of this process, P patches, K of them seen, D the encoder's width, E the decoder's,
X numbers decoded of a patch.
"""

import torch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

HEAD = 32
"""Dimensions of an attention's head, as in the paper."""

_DEVIATION = 0.02  # of initial tokens


def tokens_of(encoder: nn.Module, images_NCHW: torch.Tensor, seen_NK: torch.Tensor) -> torch.Tensor:
    """The class's token and those of the patches seen, ``(N, 1 + K, D)``.

    By the encoder's own forward pass, which strategies hang their work on: tokens are left out
    once they have their places.

    Args:
        encoder: torchvision's vision transformer.
        images_NCHW: of its size.
        seen_NK: numbers of patches, in reading order.
    """
    kept_NK1 = torch.cat([torch.zeros_like(seen_NK[:, :1]), 1 + seen_NK], 1)[..., None]
    tokens: list[torch.Tensor] = []

    def leave_out(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0].gather(1, kept_NK1.expand(-1, -1, inputs[0].shape[-1]))

    transformer = encoder.get_submodule("encoder")
    hooks = [
        transformer.get_submodule("layers").register_forward_pre_hook(leave_out),
        transformer.register_forward_hook(lambda _, __, output: tokens.append(output)),
    ]
    try:
        encoder(images_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens[0]


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
