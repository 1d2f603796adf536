"""What an objective's loss keeps on one process, of :class:`trainer.objectives.cost.LossCost`."""

from trainer.config import RunConfig
from trainer.objectives.cost import LossCost

_FLOAT = 4
_ITEM = {"bf16": 2, "fp32": 4, "fp64": 8}
_TILE = {"cpu": 512, "cuda": 4096}  # sides of the blocked implementation's tile
_GROUPS = 64  # partial sums of a row that the Triton kernels keep, at most


def loss_cost(config: RunConfig, local_batch: int, world_size: int) -> LossCost:
    """The loss of ``config`` for ``local_batch`` images on each of ``world_size`` processes."""
    return config.objective.cost(local_batch, world_size, config.head.out_dim, config.crop)


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
