"""InfoNCE whose keys take a gradient too: the whole matrix's, on any number of processes."""

import pytest
import torch
from torch.nn.functional import normalize

from kernels.ntxent import two_sided
from tests.dist import run_ranks

TEMPERATURE = 0.2
QUERIES, KEYS = 24, 9


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    queries, keys = (
        torch.randn(count, 6, generator=generator, dtype=torch.float64) for count in (QUERIES, KEYS)
    )
    return queries, keys, torch.randint(0, KEYS, (QUERIES,), generator=generator)


def _expected() -> list[torch.Tensor]:
    """Value, gradients by queries and keys, accuracy; of the whole matrix."""
    queries, keys, positive = _batch()
    leaves = queries.requires_grad_(), keys.requires_grad_()
    logits = normalize(queries, dim=1) @ normalize(keys, dim=1).T / TEMPERATURE
    value = logits.logsumexp(1).mean()
    gradients = torch.autograd.grad(value, leaves)
    return [value.detach(), *gradients, (logits.argmax(1) == positive).double().mean()]


def _ours(queries: torch.Tensor, keys: torch.Tensor, positive: torch.Tensor) -> list[torch.Tensor]:
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    value, accuracy = two_sided(*leaves, positive, TEMPERATURE)
    return [value.detach(), *torch.autograd.grad(value, leaves), accuracy]


def test_value_and_both_gradients_are_those_of_the_whole_matrix() -> None:
    for mine, other in zip(_ours(*_batch()), _expected()):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def _on_a_rank(rank: int, size: int) -> list[torch.Tensor]:
    queries, keys, positive = _batch()
    rows, columns = QUERIES // size, KEYS // size
    own, keys = slice(rank * rows, (rank + 1) * rows), keys[rank * columns : (rank + 1) * columns]
    return _ours(queries[own], keys, positive[own])


@pytest.mark.parametrize("size", [1, 3])
def test_processes_have_their_rows_of_it(size: int) -> None:
    results = run_ranks(_on_a_rank, size)
    expected = _expected()
    for result in results:
        assert torch.equal(result[0], results[0][0]), "to the last bit"
        torch.testing.assert_close(result[0], expected[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result[3], expected[3])
    for place in (1, 2):
        gathered = torch.cat([result[place] for result in results])
        torch.testing.assert_close(gathered, size * expected[place], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fewer_digits_are_as_near_as_their_rounding(dtype: torch.dtype, most: float) -> None:
    queries, keys, positive = _batch()
    found = _ours(queries.to(dtype), keys.to(dtype), positive)
    exact = _ours(queries.to(dtype).double(), keys.to(dtype).double(), positive)
    assert float((found[0] - exact[0]).abs()) < most * float(exact[0])
    for mine, other in zip(found[1:3], exact[1:3]):
        assert float((mine.double() - other).norm() / other.norm()) < most


def test_rows_that_overflow_are_not_hidden() -> None:
    queries, keys, positive = _batch()
    keys = keys.float()
    keys[0] *= 1e30
    value, *_ = _ours(queries.float(), keys, positive)
    assert bool(value.isnan())


def test_there_is_no_reference_to_ask_for() -> None:
    with pytest.raises(ValueError, match="no reference implementation"):
        two_sided(*_batch(), 0.1, implementation="reference")
