"""Features of frames that still tell where things are, and questions about their order.

Shapes: N tuples, F frames, R = F * N rows, W features of a frame and of what is made of T = 2 or 3
frames that are looked at together, Q questions.
"""

from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from trainer.models.encoders import Encoder
from trainer.objectives.parts.decoder import LastMaps

_GRID = 3  # cells along a side of the maps, as far as they have as many pixels
# Of five frames, what may lie between 1 and 3. The right one is asked about twice, so that yes is
# right half the time.
MIDDLES = (2, 0, 4)
ORDERS = tuple(order for order in permutations(range(4)) if order[0] < order[3])


class FrameFeatures(nn.Module):
    """W features of each frame, of the encoder's last maps: pooled to one pixel they would not
    tell where something is, and so not which way it went.

    Args:
        encoder: of frames.
        side: of the frames, pixels.
        width: W.

    Raises:
        ConfigError: the encoder has no maps.
    """

    def __init__(self, encoder: Encoder, side: int, width: int) -> None:
        super().__init__()
        self.maps = LastMaps(encoder, side)
        self.cell = -(-self.maps.side // _GRID)  # pixels of its side
        cells = (-(-self.maps.side // self.cell)) ** 2
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(cells * self.maps.channels, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )

    def forward(self, encoder: Encoder, frames_RCHW: torch.Tensor) -> torch.Tensor:
        """``(R, W)``."""
        maps_RChw = self.maps(encoder, frames_RCHW)
        features: torch.Tensor = self.layers(avg_pool2d(maps_RChw, self.cell, ceil_mode=True))
        return features


class Questions(NamedTuple):
    """What is asked about the frames of a tuple, which are numbered in the order of time."""

    shown: tuple[tuple[int, ...], ...]
    """Frames that are looked at together."""
    forwards: tuple[tuple[int, ...], ...]
    """Of which of those each question is made."""
    backwards: tuple[tuple[int, ...], ...]
    """The same for tuples that are shown the other way round; the answers stay."""
    answers: int
    """That there are to each."""

    def looks(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is looked at together: of each frame's ``(N, W)``, ``(looks * N, T * W)``."""
        return torch.cat([torch.cat([features[frame] for frame in look], 1) for look in self.shown])

    def asked(self, looks_RW: torch.Tensor, is_backwards_N: torch.Tensor) -> torch.Tensor:
        """All questions ``(N, Q, ...)``, of what was made of the looks."""
        looks = looks_RW.unflatten(0, (len(self.shown), -1)).unbind()
        forwards, backwards = (
            torch.stack([torch.cat([looks[look] for look in each], 1) for each in which], 1)
            for which in (self.forwards, self.backwards)
        )
        return torch.where(is_backwards_N[:, None, None], backwards, forwards)


def said(logits_NQK: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the answers say of each tuple, and of which frame ``(N,)``."""
    numbers_N = torch.arange(len(logits_NQK), device=logits_NQK.device)
    if logits_NQK.shape[2] == QUESTIONS["between"].answers:
        surest_N = (logits_NQK[:, 1:, 1] - logits_NQK[:, 1:, 0]).argmax(1)
        middle_N = torch.tensor(MIDDLES, device=logits_NQK.device)[surest_N]
        before_N, after_N = torch.full_like(middle_N, 1), torch.full_like(middle_N, 3)
        return {"before": before_N, "said to lie between": middle_N, "after": after_N}
    asked_N = numbers_N % len(ORDERS)
    orders_Q4 = torch.tensor(ORDERS, device=logits_NQK.device)
    shown_N4, told_N4 = orders_Q4[asked_N], orders_Q4[logits_NQK[numbers_N, asked_N].argmax(1)]
    # Frame shown[k] is said to be the told[k]-th.
    frames_N4 = shown_N4.take_along_dim(told_N4.argsort(1), 1)
    places = ("said to be first", "second", "third", "last")
    return {place: frames_N4[:, k] for k, place in enumerate(places)}


def _between() -> Questions:
    shown = (*((1, middle, 3) for middle in MIDDLES), *((3, middle, 1) for middle in MIDDLES))
    return Questions(shown, ((0,), (0,), (1,), (2,)), ((3,), (3,), (4,), (5,)), 2)


def _orders() -> Questions:
    shown = tuple(permutations(range(4), 2))

    def pairs(order: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shown.index(pair) for pair in combinations(order, 2))

    backwards = tuple(pairs(order[::-1]) for order in ORDERS)
    return Questions(shown, tuple(map(pairs, ORDERS)), backwards, len(ORDERS))


QUESTIONS = {"between": _between(), "order": _orders()}
