"""What a vision transformer makes of each patch, where some of them are left out or hidden.

By the encoder's own forward pass, which strategies hang their work on.

Shapes: N images, P patches, K of them seen, T tokens (the class's first), D dimensions.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from common.errors import ConfigError


def transformer(encoder: nn.Module, name: str, otherwise: str) -> VisionTransformer:
    """The encoder, where it has tokens.

    Raises:
        ConfigError: it is no vision transformer of torchvision's; says what there is ``otherwise``.
    """
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(
            f"--encoder.name: {name} needs a vision transformer (vit_s_16, vit_b_16 ...); for a"
            f" ResNet there is {otherwise}"
        )
    return encoder


Change = Callable[[torch.Tensor], torch.Tensor]


def seen_tokens(
    encoder: nn.Module, images_NCHW: torch.Tensor, seen_NK: torch.Tensor
) -> torch.Tensor:
    """The class's token and those of the patches seen, ``(N, 1 + K, D)``. The others are left out
    once they have their places, and take no time.

    Args:
        encoder: torchvision's vision transformer.
        images_NCHW: of its size.
        seen_NK: numbers of patches, in reading order.
    """
    kept_NK1 = torch.cat([torch.zeros_like(seen_NK[:, :1]), 1 + seen_NK], 1)[..., None]

    def leave_out(tokens_NTD: torch.Tensor) -> torch.Tensor:
        return tokens_NTD.gather(1, kept_NK1.expand(-1, -1, tokens_NTD.shape[-1]))

    return _tokens(encoder, images_NCHW, "encoder.layers", leave_out)


def all_tokens(
    encoder: nn.Module,
    images_NCHW: torch.Tensor,
    hidden_NP: torch.Tensor | None = None,
    shown: torch.Tensor | None = None,
) -> torch.Tensor:
    """All tokens, ``(N, 1 + P, D)``.

    Args:
        encoder: torchvision's vision transformer.
        images_NCHW: of any size that its patches divide.
        hidden_NP: True where another token stands for what a patch shows; it has the patch's place.
        shown: that token, ``(1, 1, D)``.
    """

    def hide(tokens_NTD: torch.Tensor) -> torch.Tensor:
        if hidden_NP is None or shown is None:
            return tokens_NTD
        patches_NPD = torch.where(
            hidden_NP[..., None], shown.to(tokens_NTD.dtype), tokens_NTD[:, 1:]
        )
        return torch.cat([tokens_NTD[:, :1], patches_NPD], 1)

    return _tokens(encoder, images_NCHW, "encoder", hide)


def patch_tokens(tokens_NTD: torch.Tensor, numbers_NK: torch.Tensor) -> torch.Tensor:
    """Tokens of these patches, ``(N * K, D)``."""
    patches_NPD = tokens_NTD[:, 1:]
    return patches_NPD.take_along_dim(numbers_NK[..., None], 1).flatten(0, 1)


def _tokens(
    encoder: nn.Module, images_NCHW: torch.Tensor, where: str, change: Change
) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hooks = [
        encoder.get_submodule(where).register_forward_pre_hook(lambda _, given: change(given[0])),
        encoder.get_submodule("encoder").register_forward_hook(
            lambda _, __, output: found.append(output)
        ),
    ]
    try:
        encoder(images_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]
