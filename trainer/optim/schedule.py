"""The learning rate of every step: a pure function of the step's number.

Steps count from 0 and the run has T of them, S of which are warm-up. With x the step's place after
warm-up, ``(step - S) / (T - S)``:

* warm-up: ``start + (1 - start) * step / S``, so step 0 has the rate ``start`` (0 by default, as in
  the published SimCLR and MoCo v3) and step S the peak;
* cosine: ``final + (1 - final) * (1 + cos(pi x)) / 2`` (Loshchilov & Hutter 2017 without restarts),
  so the last step, T - 1, has a rate just above ``final``, which step T would have;
* steps: ``gamma`` to the number of milestones reached; constant: 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

from common.bounds import check_bounds
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate goes, as a factor of its peak."""

    kind: Literal["cosine", "steps", "constant"] = "cosine"
    """What follows the warm-up."""
    warmup_epochs: float = 10.0
    """Length of the linear warm-up, in epochs; fractions and 0 are fine."""
    warmup_start_fraction: float = 0.0
    """Rate of step 0 as a fraction of the peak."""
    final_lr_fraction: float = 0.0
    """Where the cosine ends, as a fraction of the peak."""
    cosine_per: Literal["step", "epoch"] = "step"
    """epoch: the rate is held through an epoch and changes between epochs (MoCo v1 and v2)."""
    milestones: tuple[float, ...] = (120.0, 160.0)
    """For steps: epochs after which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """For steps: the factor at each milestone."""
    final_weight_decay: float | None = None
    """Where a cosine over the whole run brings --optim.weight-decay. None: it stays."""

    def __post_init__(self) -> None:
        fractions = ("warmup_start_fraction", "final_lr_fraction", "gamma")
        check_bounds(self, "--schedule.", **dict.fromkeys(fractions, "[0, 1]"))
        check_bounds(self, "--schedule.", warmup_epochs="[0, 1e9]", milestones="[0, 1e9]")
        if self.final_weight_decay is not None:
            check_bounds(self, "--schedule.", final_weight_decay="[0, inf)")
        if list(self.milestones) != sorted(self.milestones):
            shown = " ".join(map(str, self.milestones))
            raise ConfigError(f"--schedule.milestones {shown}: must ascend")


def half_cosine(place: float) -> float:
    """``(1 + cos(pi place)) / 2``: from 1 at place 0 to 0 at 1, flat at both ends."""
    return (1 + math.cos(math.pi * place)) / 2


def warmup_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Warm-up in whole steps."""
    return round(config.warmup_epochs * steps_per_epoch)


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of ``step`` as a factor of the peak, in [0, 1].

    Args:
        config: the schedule.
        step: optimizer steps done before this one; from ``total_steps`` on the end value is held.
        steps_per_epoch: for what is given in epochs.
        total_steps: length of the run, warm-up included. When that is not longer than the warm-up,
            the whole run is warm-up.
    """
    warmup = warmup_steps(config, steps_per_epoch)
    if step < warmup:
        start = config.warmup_start_fraction
        return start + (1 - start) * step / warmup
    if config.kind == "constant":
        return 1.0
    if config.kind == "steps":
        reached = sum(step >= round(epoch * steps_per_epoch) for epoch in config.milestones)
        return float(config.gamma**reached)
    if config.cosine_per == "epoch":
        step = max(warmup, step - step % steps_per_epoch)
    place = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    final = config.final_lr_fraction
    return final + (1 - final) * half_cosine(place)


def weight_decay_at(
    config: ScheduleConfig, weight_decay: float, step: int, total_steps: int
) -> float | None:
    """The weight decay of ``step``, which begins as ``weight_decay``; None: it stays so."""
    final = config.final_weight_decay
    if final is None:
        return None
    place = min(1.0, step / max(1, total_steps))
    return final + (weight_decay - final) * half_cosine(place)
