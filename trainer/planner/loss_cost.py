"""What the contrastive loss keeps, computes and sends, by arithmetic.

The loss is the only part of a step that sees other processes' rows, so it is not counted on one
process's tensors as the rest is (:mod:`trainer.planner.step_cost`), but from its algorithm
(:mod:`kernels.ntxent`).

Shapes: M rows of this process, N columns that they meet, D dimensions.
"""

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.objectives.base import Objective
from trainer.objectives.moco import MoCoConfig
from trainer.objectives.mocov3 import MoCoV3Config

_FLOAT = 4
_ITEM = {"bf16": 2, "fp32": 4, "fp64": 8}
_TILE = {"cpu": 512, "cuda": 4096}  # sides of the blocked implementation's tile
_GROUPS = 64  # partial sums of a row that the Triton kernels keep, at most


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A step's loss on one process, forward and backward."""

    rows: int
    """M."""
    columns: int
    """N: of all processes, or the queue."""
    dim: int
    """D."""
    times: int
    """Evaluations in a step: 2 where the loss is symmetric (MoCo v3). Each gathers its rows once
    as embeddings and once as statistics."""
    statistics: int
    """Float32 numbers gathered of a row: of its log-sum-exp, its positive's logit, and whether that
    is the largest; InfoNCE sends the difference of the first two."""
    flops: float
    """Of the products of all evaluations; a multiply-add is 2."""
    exponentials: float
    """Of all evaluations."""
    bytes: int
    """At its peak, beside the projections."""


def contrast(config: RunConfig, local_batch: int, world_size: int, device: str) -> Contrast:
    """Count the loss of ``config`` for ``local_batch`` images on each of ``world_size`` processes.

    ``device``, "cuda" or "cpu", decides how it is tiled.
    """
    dim, objective, views = config.head.out_dim, config.objective, Objective.views
    if isinstance(objective, MoCoConfig | MoCoV3Config):
        rows, columns, times = local_batch, local_batch * world_size, views
        if isinstance(objective, MoCoConfig):
            columns, times = objective.queue + 1, 1
        pairs = 6.0 * rows * columns  # forward 2, backward 2 for the logit again and 2 for the sum
        exponentials, statistics = 2.0 * rows * columns, 2
    else:
        rows, columns, times = views * local_batch, views * local_batch * world_size, 1
        forward = rows * rows / 2 + rows * (columns - rows)  # the own block is symmetric
        pairs = 2 * forward + 4.0 * rows * columns
        exponentials, statistics = forward + rows * columns, 3
    return Contrast(
        rows=rows,
        columns=columns,
        dim=dim,
        times=times,
        statistics=statistics,
        flops=times * pairs * dim,
        exponentials=times * exponentials,
        bytes=_bytes(config, rows, columns, times, device),
    )


def _bytes(config: RunConfig, rows: int, columns: int, times: int, device: str) -> int:
    dim, item = config.head.out_dim, _ITEM[config.precision]
    wide = max(_FLOAT, item)
    # Unit rows in float32 and as factors, all columns as factors, log-sum-exps, the gradient.
    kept = times * (rows * dim * (wide + item) + columns * (dim * item + 2 * wide))
    kept += 2 * rows * dim * wide
    if config.objective.loss_implementation == "reference":
        return kept + 3 * rows * columns * wide  # logits, probabilities, their gradient
    if device == "cuda" and config.objective.loss_implementation != "blocked":
        return kept + rows * _GROUPS * wide
    tile = min(_TILE[device], rows) * min(_TILE[device], columns)
    return kept + 2 * tile * wide
