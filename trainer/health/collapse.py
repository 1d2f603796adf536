"""Is the network still telling images apart? Two figures of the projections, and an alarm.

A collapsed network maps all images to one point (the loss can hide it for long), or to a few
dimensions. From the unit-length projections z of the global batch, every few steps:

- feature standard deviation: ``sqrt(D) * mean_d std(z_d)``, 1 for directions spread evenly over the
  sphere, 0 for a single point (Chen & He 2021, arXiv 2011.10566, figure 2);
- effective rank: the exponential of the entropy of the singular values of Z, divided by their sum
  (RankMe, Garrido et al. 2023, arXiv 2210.02885), between 1 and D.

Both follow from the sums of z and of z zᵀ, which add up over ranks: an all-reduce of D² + D + 1
numbers, exact at any world size up to rounding. The eigenvalues are taken on the host of rank 0
when the telemetry waits for the device anyway. Every 20 steps that is under 0.1 % of the time.

The alarm's limits are far from good runs: in the first 40 steps of SimCLR, MoCo v2 and v3 with
ResNet-18 on CIFAR-10, measured every other step, the lowest were 0.29 and 23 (MoCo v2's).

Shapes: M rows of this process, D dimensions.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from common.bounds import check_bounds
from common.collectives import rank_and_size, waiting
from trainer.telemetry import Reader, Record

log = logging.getLogger(__name__)

_MOST_DIMENSIONS = 512  # above, eigenvalues would take more than 1 % of the time


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """When the projections count as collapsed."""

    every_steps: int = 20
    """Measure after every so many steps; 0: never."""
    feature_std: float = 0.01
    """Alarm where the feature standard deviation, between 0 and 1, is below this."""
    effective_rank: float = 1.5
    """Alarm where the effective rank, 1 or more, is below this. Measured up to 512 dimensions."""
    measurements: int = 2
    """In so many measurements in a row."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """Say so once, or end the run."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            "--collapse.",
            every_steps="[0, 1e9]",
            feature_std="[0, inf)",
            effective_rank="[0, inf)",
            measurements="[1, 1e9]",
        )


class CollapseAlarm(Reader):
    """Measures projections on all ranks; a telemetry reader that completes rank 0's records.

    The process that ``judges`` takes eigenvalues and decides; the others only add up.
    """

    def __init__(self, config: CollapseConfig, judges: bool) -> None:
        self._config, self._judges = config, judges
        self._moments: dict[int, torch.Tensor] = {}
        self._dimensions = 0
        self._low_for = 0
        self._last: tuple[int, float, float] | None = None

    @property
    def alarm(self) -> bool:
        """Whether the projections count as collapsed by now. On ranks that judge."""
        return self._low_for >= self._config.measurements

    @property
    def stops(self) -> bool:
        """Whether the run is to end for it. On ranks that judge."""
        return self.alarm and self._config.on_alarm == "stop"

    def measure(self, projections_MD: torch.Tensor | None, step: int) -> None:
        """Keep the moments of step ``step``, from 1, if it is one to measure. A collective then."""
        every = self._config.every_steps
        if projections_MD is None or not every or step % every:
            return
        self._dimensions = projections_MD.shape[1]
        sums = moments(projections_MD)
        if self._judges:
            self._moments[step] = sums

    def read(self, records: list[Record]) -> None:
        """Complete the records of measured steps with ``feature_std`` and ``effective_rank``."""
        for record in records:
            sums = self._moments.pop(record["step"], None)
            if sums is not None:
                std, rank = figures(sums.cpu(), self._dimensions)
                record["feature_std"] = round(std, 6)
                if rank is not None:
                    record["effective_rank"] = round(rank, 4)
                self._judge(record["step"], std, math.inf if rank is None else rank)

    def _judge(self, step: int, std: float, rank: float) -> None:
        if not math.isfinite(std):
            return  # lost numbers are the guard's affair
        low = std < self._config.feature_std or rank < self._config.effective_rank
        before = self.alarm
        self._low_for = self._low_for + 1 if low else 0
        self._last = (step, std, rank)
        if self.alarm and not before:
            log.warning("%s", self.reason())

    def reason(self) -> str:
        """What was found, and what to do."""
        if self._last is None:
            return "the projections have collapsed; rank 0 says how far"
        step, std, rank = self._last
        return (
            f"step {step}: the projections have collapsed (feature standard deviation {std:.3g} of"
            f" 1, effective rank {rank:.3g}): all images look alike to the network; lower"
            " --optim.base-lr, lengthen --schedule.warmup-epochs, or see --collapse.*"
        )


@torch.no_grad()
def moments(projections_MD: torch.Tensor) -> torch.Tensor:
    """Sums over all ranks of z zᵀ, z and 1, for rows z of unit length. A collective.

    Args:
        projections_MD: ``(M, D)``, any floating dtype, not normalised.

    Returns:
        float64 on the device: ``(D*D + D + 1,)``, or ``(2*D + 1,)`` with the diagonal of z zᵀ alone
        where D is above 512. Equal on all ranks.
    """
    z_MD = torch.nn.functional.normalize(projections_MD.detach().double(), dim=1)
    dimensions = z_MD.shape[1]
    squares = z_MD.T @ z_MD if dimensions <= _MOST_DIMENSIONS else z_MD.square().sum(0)
    count = z_MD.new_full((1,), len(z_MD))
    packed = torch.cat([squares.flatten(), z_MD.sum(0), count])
    if rank_and_size()[1] > 1:
        with waiting("moments of projections: all-reduce"):
            dist.all_reduce(packed)
    return packed


def figures(packed: torch.Tensor, dimensions: int) -> tuple[float, float | None]:
    """Feature standard deviation and effective rank of :func:`moments`, on the host.

    The rank is ``None`` above 512 dimensions; both are NaN where the moments are not finite.
    """
    squares, sums_D, count = packed[: -dimensions - 1], packed[-dimensions - 1 : -1], packed[-1]
    whole = len(squares) > dimensions
    second_DD = (squares.view(dimensions, dimensions) if whole else squares.diag()) / count
    variance_D = (second_DD.diagonal() - (sums_D / count).square()).clamp_min(0)
    std = float(variance_D.sqrt().mean()) * math.sqrt(dimensions)
    if not whole:
        return std, None
    if not math.isfinite(std):
        return std, math.nan
    singular_D = torch.linalg.eigvalsh(second_DD).clamp_min(0).sqrt()
    if not singular_D.any():
        return std, 1.0  # rows of zeros, which have no direction
    share_D = singular_D / singular_D.sum() + 1e-7  # RankMe, equation 1
    return std, float(torch.exp(-(share_D * share_D.log()).sum()))
