"""MoCo's key encoder: a moving average of the query encoder, moved after every optimizer step.

He et al. 2020, arXiv 1911.05722, eq. 2; the cosine of the momentum is MoCo v3's, arXiv 2104.02057.
The papers' code moves it before the next forward pass, which is the same: the average over queries
up to the newest step.
"""

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from trainer.optim.schedule import half_cosine
from trainer.optim.sharded_norms import local

MomentumSchedule = Literal["constant", "cosine"]


class KeyEncoder(nn.Module):
    """A copy of an encoder and its head that takes no gradient.

    Its parameters are averages, its BatchNorm statistics its own. Parameters do not require
    gradients, so that neither DDP nor the optimizer manages them; they are in ``state_dict``.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Keys ``(N, D)``, not normalised."""
        keys: torch.Tensor = self.head(self.encoder(images_NCHW))
        return keys

    @torch.no_grad()
    def follow(
        self, encoder: nn.Module, head: nn.Module, momentum: float, skipped: torch.Tensor
    ) -> None:
        """``k = m k + (1 - m) q`` for every parameter, or nothing where ``skipped`` is 1.

        q are the networks that this one was copied from. ``skipped`` is 0-d, on the parameters'
        device, which the host does not wait for.
        """
        keys = list(_parameters(self.encoder, self.head))
        if momentum == 1:  # 0 times a query that is not finite would be NaN
            return
        # Averaging with an unchanged q would move k. The old values are kept instead of asked for.
        before = [key.clone() for key in keys]
        torch._foreach_mul_(keys, momentum)
        torch._foreach_add_(keys, list(_parameters(encoder, head)), alpha=1.0 - momentum)
        left_out = skipped > 0
        for key, old in zip(keys, before):
            torch.where(left_out, old, key, out=key)


def momentum_at(momentum: float, schedule: MomentumSchedule, step: int, total_steps: int) -> float:
    """The key encoder's momentum for the average before the forward pass of ``step``, from 0.

    ``1 - (1 - m) (1 + cos(pi step / total)) / 2`` for the cosine: m at step 0, 1 at the end.
    """
    if schedule == "constant":
        return momentum
    place = min(1.0, step / max(1, total_steps))
    return 1.0 - (1.0 - momentum) * half_cosine(place)


def _parameters(*modules: nn.Module) -> Iterator[torch.Tensor]:
    """Of sharded ones this process's pieces: those of a key and its query are cut alike."""
    for module in modules:
        yield from (local(parameter) for parameter in module.parameters())
