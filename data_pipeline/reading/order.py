"""Which sample stands where: ``(seed, epoch, position) -> sample id``, a pure function.

The permutation of an epoch is a balanced Feistel network on the smallest even-bit domain that
holds the data set, with cycle walking (Black & Rogaway, CT-RSA 2002): a bijection that any process
evaluates at any positions without storing or exchanging a table of them. A global batch is
``batch_size`` consecutive positions and a rank's share is a consecutive slice of it, so the samples
of a step do not depend on the number of ranks, and resuming is arithmetic.

An epoch may show some samples only, or some more often than others: :class:`EpochOrder`.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from common.randomness import Stream, absorb, run_key, sample_keys, uniforms

IdArray = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

_ROUNDS = 8  # four make a strong pseudo-random permutation; eight keep tiny domains well mixed


@dataclass(frozen=True)
class Position:
    """A place in training: the ``step``-th global batch (from 0) of an ``epoch`` (from 0)."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Which samples stand at the places of an epoch, the same on all ranks.

    Without weights the places are a permutation. With weights a sample takes places in proportion
    to its own, and shows other views at each of them. They are drawn by strata rather than one by
    one: samples next to each other that weigh ``w`` of all take ``w * places``, give or take two.
    """

    places: int
    """Of an epoch."""
    ids_M: IdArray | None = None  # noqa: N815
    """Distinct samples; None: all, and as many as places."""
    weights_M: Weights | None = None  # noqa: N815
    """Of them, 0 or more."""

    @classmethod
    def of(cls, ids_M: IdArray) -> "EpochOrder":
        """These samples, once."""
        return cls(len(ids_M), ids_M)

    @classmethod
    def weighted(cls, weights_N: Weights, places: int) -> "EpochOrder":
        """All samples, in proportion to their weights.

        Raises:
            ValueError: a weight is negative or not finite, or all are 0.
        """
        return cls(places, np.arange(len(weights_N)), _checked(weights_N))

    @classmethod
    def balanced(cls, groups_N: IdArray | torch.Tensor, places: int) -> "EpochOrder":
        """Every group alike, and every sample of a group: classes, clusters.

        Args:
            groups_N: each sample's group, on any device; samples of a negative one are not shown.
            places: of an epoch; each group takes its equal share, give or take two.

        Raises:
            ValueError: no sample has a group.
        """
        if isinstance(groups_N, torch.Tensor):
            groups_N = groups_N.cpu().numpy()
        ids_M = np.argsort(groups_N, kind="stable")  # a group's samples share their strata
        ids_M = ids_M[np.searchsorted(groups_N[ids_M], 0) :]
        _, group_M, sizes = np.unique(groups_N[ids_M], return_inverse=True, return_counts=True)
        return cls(places, ids_M, _checked(1 / sizes[group_M]))

    def at(
        self,
        seed: int,
        epoch: int,
        places_B: npt.ArrayLike,
    ) -> tuple[IdArray, IdArray]:
        """Sample ids at some places, and the numbers that their views are drawn by.

        The latter are the ids where nothing is weighted; else each place of a sample has another.
        """
        drawn_B = permute(seed, epoch, places_B, self.places)
        if self.weights_M is None:
            ids_B = drawn_B if self.ids_M is None else self.ids_M[drawn_B]
            return ids_B, ids_B
        assert self.ids_M is not None  # noqa: S101 - weights are of samples
        ends_M, last, above = self._strata
        stratum = ends_M[-1] / self.places
        jitter_B = uniforms(sample_keys(seed, epoch, drawn_B, 0, Stream.WEIGHTED), 0)
        which_B = np.searchsorted(ends_M, (drawn_B + jitter_B) * stratum, side="right")
        which_B = which_B.clip(max=last)
        # A sample's places lie next to each other among the strata.
        starts_B = ends_M[which_B] - self.weights_M[which_B]
        time_B = (drawn_B - np.floor(starts_B / stratum).astype(np.int64)).clip(min=0)
        return self.ids_M[which_B], self.ids_M[which_B] + time_B * above

    @cached_property
    def _strata(self) -> tuple[Weights, int, int]:
        """Where each sample's stretch ends, the last with a weight, a number above all ids."""
        assert self.ids_M is not None  # noqa: S101
        assert self.weights_M is not None  # noqa: S101
        last = int(np.flatnonzero(self.weights_M)[-1])
        return np.cumsum(self.weights_M), last, int(self.ids_M.max()) + 1


def _checked(weights: Weights) -> Weights:
    if not (np.isfinite(weights.sum()) and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("weights must be finite, not negative, and some above 0")
    return weights


def permute(seed: int, epoch: int, positions: npt.ArrayLike, num_samples: int) -> IdArray:
    """Sample ids at ``positions`` of an epoch's permutation of ``range(num_samples)``.

    Args:
        seed: the run's seed.
        epoch: from 0; every epoch has its own permutation.
        positions: integers in ``[0, num_samples)``, any shape.
        num_samples: size of the data set.

    Returns:
        int64 ids of the shape of ``positions``; distinct positions give distinct ids.

    Raises:
        IndexError: a position lies outside the data set.
    """
    x = np.asarray(positions, dtype=np.int64)
    if x.size and (x.min() < 0 or x.max() >= num_samples):
        raise IndexError(f"positions must lie in [0, {num_samples}), got {x.min()}..{x.max()}")
    half_bits = max(1, (max(num_samples - 1, 1).bit_length() + 1) // 2)
    rounds = _round_functions(seed, epoch, half_bits)
    value = _feistel(x.reshape(-1), rounds, half_bits)
    # The domain is at most four times the data set: walk on from values outside it.
    outside = np.flatnonzero(value >= num_samples)
    while outside.size:
        value[outside] = walked = _feistel(value[outside], rounds, half_bits)
        outside = outside[walked >= num_samples]
    return value.reshape(x.shape)


@lru_cache(maxsize=4)  # an epoch's and the next one's, for training and another set
def _round_functions(seed: int, epoch: int, half_bits: int) -> list[IdArray]:
    """What each round makes of each right half: few values, in the place of hashing every one."""
    halves = np.arange(1 << half_bits, dtype=np.uint64)
    mask = np.uint64((1 << half_bits) - 1)
    with np.errstate(over="ignore"):
        key = absorb(run_key(seed, epoch), np.array(int(Stream.ORDER), np.uint64))
        round_keys = [absorb(key, np.array(r, np.uint64)) for r in range(_ROUNDS)]
        return [(absorb(key, halves) & mask).astype(np.int64) for key in round_keys]


def _feistel(x: IdArray, rounds: list[IdArray], half_bits: int) -> IdArray:
    left, right = x >> half_bits, x & ((1 << half_bits) - 1)
    for of_half in rounds:
        left, right = right, left ^ of_half[right]
    return (left << half_bits) | right


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that ``rank`` carries; the world size divides the batch."""
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} does not divide by {world_size} processes")
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
