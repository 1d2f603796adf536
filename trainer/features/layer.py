"""Features of a layer in the middle of an encoder, pooled to one row an image.

Pretext tasks are often at their best there (Zhang et al. 2016, arXiv 1603.08511): the last stage
knows the task's answers instead of the image's content.
"""

from typing import Any

import torch
import torchvision
from torch import nn

from common.errors import ConfigError


class LayerFeatures(nn.Module):
    """An encoder whose features are those of one of its layers: the mean of maps ``(N, C, h, w)``,
    of tokens ``(N, P, C)`` the first, which is the class's.

    Args:
        encoder: from ``(N, 3, H, W)``.
        layer: its name within the encoder, such as ``layer3``.

    Raises:
        ConfigError: there is no such layer.
    """

    def __init__(self, encoder: nn.Module, layer: str) -> None:
        super().__init__()
        known = dict(encoder.named_modules())
        # Swin's blocks have channels last, which nothing tells from maps.
        if (
            not layer
            or layer not in known
            or isinstance(encoder, torchvision.models.SwinTransformer)
        ):
            parts = ", ".join(name for name, _ in encoder.named_children()) or "none"
            raise ConfigError(
                f"--layer {layer}: this encoder has no such layer of maps; its parts are {parts},"
                " and PART.0 and so on within them"
            )
        self.encoder, self.layer = encoder, layer
        self._rows_NC: torch.Tensor | None = None
        known[layer].register_forward_hook(self._pool)

    def _pool(self, _: nn.Module, __: Any, output: Any) -> None:
        # Here, for what follows may write into the maps.
        pooled = {2: lambda x: x.clone(), 3: lambda x: x[:, 0].clone(), 4: lambda x: x.mean((2, 3))}
        if isinstance(output, torch.Tensor) and output.ndim in pooled:
            self._rows_NC = pooled[output.ndim](output)

    def forward(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """``(N, C)``.

        Raises:
            ConfigError: the layer's output is not one of maps, tokens or features.
        """
        self._rows_NC = None
        self.encoder(images_N3HW)
        rows_NC, self._rows_NC = self._rows_NC, None
        if rows_NC is None or len(rows_NC) != len(images_N3HW):
            raise ConfigError(f"--layer {self.layer}: gives no maps, tokens or features of images")
        return rows_NC
