"""What a step of LARS is told beside its tensors."""

from dataclasses import dataclass
from typing import Literal

Variant = Literal["simclr", "mocov3", "you"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of one step (You, Gitman & Ginsburg 2017, arXiv 1708.03888)."""

    lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    variant: Variant
    nesterov: bool = False
    eps: float = 1e-8
    """Added to the denominator of "you" only."""
