"""Rows permuted across processes arrive where they belong, and come back."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.dist import run_ranks
from trainer.objectives.parts.shuffle import batch_permutation, inverse, permute_rows

ROWS = 5


def test_a_permutation_is_one_and_depends_on_seed_and_step_alone() -> None:
    one = batch_permutation(3, 7, 1000)
    assert sorted(one) == list(range(1000))
    assert np.array_equal(one, batch_permutation(3, 7, 1000))
    for other in (batch_permutation(3, 8, 1000), batch_permutation(4, 7, 1000), np.arange(1000)):
        assert (one == other).mean() < 0.02
    assert np.array_equal(one[inverse(one)], np.arange(1000))


def test_one_process_permutes_its_own_rows() -> None:
    permutation = batch_permutation(0, 0, ROWS)
    x = torch.arange(float(ROWS))
    assert permute_rows(x, permutation).tolist() == [float(i) for i in permutation]


def test_a_permutation_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="4 places for 5 rows on each of 1 processes"):
        permute_rows(torch.zeros(ROWS), batch_permutation(0, 0, 4))


def _examples(world_size: int) -> list[torch.Tensor]:
    """All rows of all processes: projections, images in bf16 and in both layouts, numbers."""
    count = world_size * ROWS
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 4, 2, generator=rng)
    return [
        torch.randn(count, 6, dtype=torch.float64, generator=rng),
        images.bfloat16().contiguous(memory_format=torch.channels_last),
        images,
        torch.arange(count),
    ]


def _permute(rank: int, world_size: int) -> list[Any]:
    permutation = batch_permutation(1, 2, world_size * ROWS)
    results = []
    for everything in _examples(world_size):
        mine = everything[rank * ROWS : (rank + 1) * ROWS]
        there = permute_rows(mine, permutation)
        back = permute_rows(there, inverse(permutation))
        assert there.stride() == back.stride() == mine.stride()
        assert torch.equal(back, mine)
        results.append(there)
    return results


def test_rows_travel_between_processes_and_come_back() -> None:
    world_size = 3
    permutation = torch.from_numpy(batch_permutation(1, 2, world_size * ROWS))
    crossing = permutation // ROWS != torch.arange(len(permutation)) // ROWS
    assert crossing.any(), "this permutation would show nothing"
    by_rank = run_ranks(_permute, world_size)
    for everything, parts in zip(_examples(world_size), zip(*by_rank)):
        assert torch.equal(torch.cat(parts), everything[permutation])
