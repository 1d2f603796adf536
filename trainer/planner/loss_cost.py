"""What an objective's loss keeps on one process, of :class:`trainer.objectives.cost.LossCost`."""

from trainer.config import RunConfig
from trainer.objectives.base import IMAGENET_SAMPLES
from trainer.objectives.cost import LossCost, StepSizes

_FLOAT = 4
_ITEM = {"bf16": 2, "fp32": 4, "fp64": 8}
_TILE = {"cpu": 512, "cuda": 4096}  # sides of the blocked implementation's tile
_GROUPS = 64  # partial sums of a row that the Triton kernels keep, at most


def loss_costs(
    config: RunConfig, local_batch: int, world_size: int, num_samples: int = IMAGENET_SAMPLES
) -> tuple[LossCost, ...]:
    """The losses of ``config``, one or several, for ``local_batch`` images on each of
    ``world_size`` processes, of a data set of ``num_samples``."""
    dim, side = config.head.out_dim, config.crop.size
    return config.objective.costs(StepSizes(local_batch, world_size, num_samples, dim, side))


def loss_bytes(config: RunConfig, cost: LossCost, device: str) -> int:
    """At the loss's peak, beside the rows; ``device``, "cuda" or "cpu", decides how it is tiled."""
    rows, columns, dim, item = cost.rows, cost.columns, cost.dim, _ITEM[config.precision]
    wide = max(_FLOAT, item)
    # Unit rows in float32 and as factors, all columns as factors, log-sum-exps, the gradient.
    kept = cost.times * (rows * dim * (wide + item) + columns * (dim * item + 2 * wide))
    kept += 2 * rows * dim * wide
    if cost.implementation == "reference":
        return kept + 3 * rows * columns * wide  # logits, probabilities, their gradient
    if device == "cuda" and cost.implementation != "blocked":
        return kept + rows * _GROUPS * wide
    tile = min(_TILE[device], rows) * min(_TILE[device], columns)
    return kept + 2 * tile * wide
