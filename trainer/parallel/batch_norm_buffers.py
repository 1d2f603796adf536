"""BatchNorm's running statistics beside a step that is left out: as if it had not been.

They move in the forward pass, before it is known whether the gradients are finite; one batch that
is not would leave NaN in them for good.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Those of every BatchNorm of a module, kept while a step is made.

    Args:
        module: its layers' buffers are looked up once; they must stay the same tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._live = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them, before a forward pass. Device work only."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self, skipped: torch.Tensor) -> None:
        """Put back what was kept, to the bit, where ``skipped`` (0-d, on the device) holds 1."""
        left_out = skipped.bool()
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(torch.where(left_out, kept, live))
