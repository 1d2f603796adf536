"""Heads: the small networks between an encoder's features and the loss.

Shapes: N rows, F features of the encoder, D output dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common.bounds import check_bounds


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A multilayer perceptron; the defaults are SimCLR v1's (arXiv 2002.05709).

    SimCLR v2 has 3 layers. MoCo v1 is 1 layer without norm; MoCo v2 is 2 layers without any norm;
    MoCo v3's projector is 2 layers (3 for transformers) of 4096 with a plain last norm, its
    predictor 2 layers without a last norm, and no bias in either.
    """

    layers: int = 2
    """Linear layers, with activations between them."""
    hidden_dim: int = 2048
    """Width between layers; 0: as wide as the encoder's features."""
    out_dim: int = 128
    """Dimensions in which views are compared."""
    hidden_norm: Literal["batch", "none"] = "batch"
    """What follows every linear layer but the last, before its activation."""
    last_norm: Literal["scale", "affine", "plain", "none"] = "scale"
    """BatchNorm after the last layer: with a learnt scale and no bias (SimCLR), with both, with
    neither (MoCo v3), or none."""
    activation: Literal["relu", "gelu"] = "relu"
    """Between linear layers."""
    linear_bias: Literal["without-norm", "never"] = "without-norm"
    """Which linear layers have a bias: those that no norm follows, or none."""

    def __post_init__(self) -> None:
        bounds = {"layers": "[1, 1000]", "hidden_dim": "[0, 1e9]", "out_dim": "[1, 1e9]"}
        check_bounds(self, "--head|objective.predictor.", **bounds)


class ProjectionHead(nn.Module):
    """``(N, F) -> (N, D)``, not normalised. Weights start as torch's ``nn.Linear`` makes them."""

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.out_dim = config.out_dim
        hidden = config.hidden_dim or in_dim
        widths = [in_dim, *[hidden] * (config.layers - 1), config.out_dim]
        self.layers = nn.ModuleList(
            _layer(widths[i], widths[i + 1], config, last=i == config.layers - 1)
            for i in range(config.layers)
        )

    def forward(self, features_NF: torch.Tensor) -> torch.Tensor:
        """Project the encoder's output."""
        x = features_NF
        for layer in self.layers:
            x = layer(x)
        return x


def _layer(in_dim: int, out_dim: int, config: HeadConfig, *, last: bool) -> nn.Sequential:
    if last:
        norm = _last_norm(out_dim, config)
    else:
        norm = nn.BatchNorm1d(out_dim) if config.hidden_norm == "batch" else None
    bias = norm is None and config.linear_bias == "without-norm"
    layer = nn.Sequential()
    layer.add_module("linear", nn.Linear(in_dim, out_dim, bias=bias))
    if norm is not None:
        layer.add_module("norm", norm)
    if not last:
        inside = nn.GELU() if config.activation == "gelu" else nn.ReLU(inplace=True)
        layer.add_module(config.activation, inside)
    return layer


def _last_norm(out_dim: int, config: HeadConfig) -> nn.Module | None:
    if config.last_norm == "none":
        return None
    if config.last_norm == "plain":
        return nn.BatchNorm1d(out_dim, affine=False)
    return nn.BatchNorm1d(out_dim, bias=config.last_norm == "affine")
