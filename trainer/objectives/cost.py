"""What an objective's loss computes, keeps and sends, by arithmetic: for plans.

The loss is the only part of a step that sees other processes' rows, so it is not counted on one
process's tensors as the rest is (:mod:`trainer.planner.step_cost`), but from its algorithm.

Shapes: M rows of this process, N columns that they meet, D dimensions.
"""

from typing import NamedTuple

from kernels.ntxent import Implementation


class StepSizes(NamedTuple):
    """Of a step, for which an objective tells its cost."""

    local_batch: int
    """Images of this process."""
    world_size: int
    num_samples: int
    """Of the data set."""
    dim: int
    """Of the run's projections."""
    side: int
    """Of the main views, pixels."""


class LossCost(NamedTuple):
    """A step's loss on one process, forward and backward."""

    rows: int
    """M."""
    columns: int
    """N: of all processes, of a queue or bank, prototypes."""
    dim: int
    """D."""
    products: float
    """Of a row and a column, in an evaluation; each is 2 D FLOPs."""
    exponentials: float
    """In an evaluation."""
    implementation: Implementation
    """reference holds the whole matrix."""
    times: int = 1
    """Evaluations in a step: 2 where the loss is symmetric (MoCo v3)."""
    gathers: bool = True
    """Whether each evaluation gathers the rows of all processes."""
    statistics: int = 2
    """Numbers gathered of a row: of its log-sum-exp, its positive's logit, and whether that is the
    largest; InfoNCE sends the difference of the first two."""
    exchanged: int = 0
    """Values of an image that change processes: shuffled images and their keys."""
    reduced: int = 0
    """Numbers that are added up over all processes, whatever the batch: of a matrix of
    correlations."""

    @property
    def flops(self) -> float:
        """Of the products of all evaluations; a multiply-add is 2."""
        return 2.0 * self.times * self.products * self.dim


def nt_xent_cost(step: StepSizes, how: Implementation) -> LossCost:
    """Of two views of each image against all others."""
    rows = 2 * step.local_batch
    columns = rows * step.world_size
    forward = rows * rows / 2 + rows * (columns - rows)  # the own block is symmetric
    products = forward + 2.0 * rows * columns  # backward: the logit again, and the sum
    exponentials = forward + rows * columns
    return LossCost(rows, columns, step.dim, products, exponentials, how, statistics=3)


def info_nce_cost(rows: int, columns: int, dim: int, how: Implementation) -> LossCost:
    """Of rows against columns that take no gradient."""
    return LossCost(rows, columns, dim, 3.0 * rows * columns, 2.0 * rows * columns, how)


def two_sided_cost(rows: int, columns: int, dim: int) -> LossCost:
    """Of rows against columns that take a gradient too."""
    return LossCost(rows, columns, dim, 5.0 * rows * columns, 3.0 * rows * columns, "auto")


def correlation_cost(step: StepSizes) -> LossCost:
    """Of a matrix that has each dimension of one view meet each of the other, summed over images;
    each process makes its images' part."""
    numbers = step.dim * step.dim
    products = 3.0 * numbers  # backward: one for each view
    return LossCost(
        step.dim,
        step.dim,
        step.local_batch,
        products,
        0.0,
        "reference",
        gathers=False,
        reduced=numbers,
    )


def softmax_cost(rows: int, columns: int, dim: int) -> LossCost:
    """Of a classifier's cross-entropy over logits that are all held; its images do not meet."""
    products, exponentials = 3.0 * rows * columns, 2.0 * rows * columns
    return LossCost(rows, columns, dim, products, exponentials, "reference", gathers=False)
