"""The Triton NT-Xent and InfoNCE against float64; run by ``test_ntxent_triton.py``.

The interpreter shows that the kernels compute the right thing. It does not round as tensor cores
do: bfloat16 factors are widened in it (it multiplies them wrongly), float32 ones are not split.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from kernels import dispatch
from kernels.ntxent import cpu, info_nce, nt_xent, two_sided
from kernels.ntxent import triton as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONLINE = 100.0  # 1 / 0.01: beyond what one shift for all rows can hold
BOUNDED = 10.0
# Own rounding of a float32 sum; what twice the error of plain torch means where that is exact.
FLOOR = 2e-7


def _rows(
    count: int, dim: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> torch.Tensor:
    """Unit rows in two halves that resemble each other, as two views do."""
    generator = torch.Generator().manual_seed(1000 * count + dim + seed)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    half = count // 2
    rows[half : 2 * half] = 0.7 * rows[:half] + 0.5 * rows[half : 2 * half]
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


def _statistics(
    all_ND: torch.Tensor,
    own: slice,
    inv_t: float,
    block: int | None = None,
    positive_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the own rows over all rows, from the own block and what is left and right of it."""
    rows = all_ND[own]
    nowhere_M = torch.full((len(rows),), -1)
    positive_M = nowhere_M if positive_M is None else positive_M
    options: dict[str, Any] = {"inv_temperature": inv_t, "block_size": block}
    lse_M, hardest_M = kernels.statistics(rows, rows, positive_M, symmetric=True, **options)
    for others in (all_ND[: own.start], all_ND[own.stop :]):
        other_lse_M, other_hardest_M = kernels.statistics(rows, others, nowhere_M, **options)
        lse_M = torch.logaddexp(lse_M, other_lse_M)
        hardest_M = torch.maximum(hardest_M, other_hardest_M)
    return lse_M, hardest_M


def _lse(all_ND: torch.Tensor, own: slice, inv_t: float, block: int | None = None) -> torch.Tensor:
    return _statistics(all_ND, own, inv_t, block)[0]


def _gradient(
    all_ND: torch.Tensor, own: slice, lse_N: torch.Tensor, inv_t: float, block: int | None = None
) -> torch.Tensor:
    return kernels.gradient(all_ND[own], all_ND, lse_N, inv_t, own=own, block_size=block)


def _exact_logits(rows: torch.Tensor, columns: torch.Tensor, inv_t: float) -> torch.Tensor:
    return rows.double() @ columns.double().T * inv_t


def _exact_own(
    all_ND: torch.Tensor, own: slice, inv_t: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exps of all rows, logits of the own rows, their gradient."""
    logits = _exact_logits(all_ND, all_ND, inv_t).fill_diagonal_(-math.inf)
    lse = logits.logsumexp(1)
    weights = (logits - lse[:, None]).exp() + (logits - lse[None, :]).exp()
    return lse, logits[own], (weights @ all_ND.double())[own]


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / max(float(exact.norm()), 1e-30))


def _plain_own(
    all_ND: torch.Tensor, own: slice, lse_N: torch.Tensor, inv_t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain torch makes of it in the dtype of the rows: the error to be measured against."""
    logits = (all_ND[own] @ all_ND.T).float() * inv_t
    itself = torch.arange(own.start, own.stop)
    logits[torch.arange(len(itself)), itself] = -math.inf
    lse_M = lse_N[own].float()
    weights = (logits - lse_M[:, None]).exp() + (logits - lse_N.float()[None, :]).exp()
    return logits.logsumexp(1), weights.to(all_ND.dtype) @ all_ND


def _check_own(all_ND: torch.Tensor, own: slice, inv_t: float, block: int | None) -> None:
    exact_lse_N, _, exact_gradient = _exact_own(all_ND, own, inv_t)
    plain_lse, plain_gradient = _plain_own(all_ND, own, exact_lse_N, inv_t)
    lse_M = _lse(all_ND, own, inv_t, block)
    gradient = _gradient(all_ND, own, exact_lse_N.float(), inv_t, block)
    assert lse_M.dtype == gradient.dtype == torch.float32
    assert lse_M.shape == (own.stop - own.start,)
    assert _error(lse_M, exact_lse_N[own]) <= 2 * _error(plain_lse, exact_lse_N[own]) + FLOOR
    # exp(s - lse) multiplies a logit's error by the logit's size
    floor = FLOOR * max(1.0, inv_t)
    assert _error(gradient, exact_gradient) <= (2 * _error(plain_gradient, exact_gradient) + floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inv_t", [BOUNDED, ONLINE])
@pytest.mark.parametrize(
    ("count", "own", "dim", "block"),
    [
        (64, slice(0, 64), 32, 16),  # whole tiles, whole dimensions
        (50, slice(0, 50), 40, 16),  # neither
        (70, slice(13, 44), 64, 32),  # a rank in the middle, no tile aligned with it
        (37, slice(30, 37), 100, 16),  # the last rank, with fewer rows than a tile
    ],
)
def test_own_rows_against_float64(
    dtype: torch.dtype, inv_t: float, count: int, own: slice, dim: int, block: int
) -> None:
    _check_own(_rows(count, dim, dtype), own, inv_t, block)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inv_t", [BOUNDED, 1 / 0.025, ONLINE])
@pytest.mark.parametrize("dim", [32, 48, 128, 200, 256, 384, 512])
@pytest.mark.parametrize(("count", "own"), [(130, slice(0, 130)), (200, slice(64, 161))])
def test_own_rows_against_float64_on_a_grid(
    dtype: torch.dtype, inv_t: float, dim: int, count: int, own: slice
) -> None:
    _check_own(_rows(count, dim, dtype), own, inv_t, None)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 21), min_size=1, max_size=3).filter(lambda s: sum(s) > 1),
    rank=st.integers(0, 2),
    dim=st.integers(1, 70),
    inv_t=st.sampled_from([1.0, BOUNDED, 41.0, ONLINE]),
    dtype=st.sampled_from(DTYPES),
)
def test_own_rows_of_odd_shapes(
    sizes: list[int], rank: int, dim: int, inv_t: float, dtype: torch.dtype
) -> None:
    rank %= len(sizes)
    start = sum(sizes[:rank])
    _check_own(_rows(sum(sizes), dim, dtype), slice(start, start + sizes[rank]), inv_t, 16)


def test_groups_of_many_blocks_share_slots_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    # With 2 groups a program adds to its slot again and again; 64 groups would need 1040 rows.
    monkeypatch.setattr(kernels, "MAX_GROUPS", 2)
    for inv_t in (BOUNDED, ONLINE):
        _check_own(_rows(120, 16), slice(0, 120), inv_t, 16)


def test_float32_chunks_of_dimensions_add_up() -> None:
    for dim in (70, 129):
        _check_own(_rows(40, dim), slice(4, 31), BOUNDED, 16)


@pytest.mark.parametrize("inv_t", [BOUNDED, ONLINE])
def test_no_two_programs_write_to_one_address(
    inv_t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter runs one program after the other: a race gives the right sum in it.
    writers: dict[int, set[tuple[int, ...]]] = {}
    store = interpreter_builder.create_masked_store

    def recording(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for address in pointers.data[mask.data].tolist():
            writers.setdefault(address, set()).add(interpreter_builder.grid_idx)
        return store(pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_store", recording)
    monkeypatch.setattr(kernels, "MAX_GROUPS", 3)
    rows, every = _rows(100, 16), slice(0, 100)

    def check() -> None:
        assert len({writer for owners in writers.values() for writer in owners}) > 1
        assert all(len(owners) == 1 for owners in writers.values())
        writers.clear()

    positive = torch.arange(100).roll(50)
    lse_N, _ = kernels.statistics(rows, rows, positive, inv_t, symmetric=True, block_size=16)
    check()
    kernels.statistics(rows, rows, positive, inv_t, block_size=16)
    check()
    _gradient(rows, every, lse_N, inv_t, 16)
    check()


@pytest.mark.parametrize("inv_t", [BOUNDED, ONLINE])
def test_hardest_negatives_are_the_largest_logits_but_the_positive(inv_t: float) -> None:
    all_ND, own = _rows(60, 24), slice(10, 50)
    positive = torch.arange(40).roll(20)
    lse_M, hardest_M = _statistics(all_ND, own, inv_t, 16, positive)
    _, logits, _ = _exact_own(all_ND, own, inv_t)
    assert torch.allclose(lse_M.double(), logits.logsumexp(1), rtol=1e-5)
    expected = logits.scatter(1, positive[:, None] + own.start, -math.inf).amax(1)
    assert torch.allclose(hardest_M.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inv_t", [5.0, ONLINE])
@pytest.mark.parametrize(("rows", "columns", "dim"), [(32, 64, 32), (21, 75, 50), (7, 3, 128)])
def test_rows_against_other_columns(
    dtype: torch.dtype, inv_t: float, rows: int, columns: int, dim: int
) -> None:
    queries, keys = _rows(rows, dim, dtype, seed=1), _rows(columns, dim, dtype, seed=2)
    positive = torch.arange(rows) % columns
    exact = _exact_logits(queries, keys, inv_t)
    lse_M, hardest_M = kernels.statistics(queries, keys, positive, inv_t, block_size=16)
    plain = ((queries @ keys.T).float() * inv_t).logsumexp(1)
    assert _error(lse_M, exact.logsumexp(1)) <= 2 * _error(plain, exact.logsumexp(1)) + FLOOR
    hardest = exact.scatter(1, positive[:, None], -math.inf).amax(1)
    assert torch.allclose(hardest_M.double(), hardest, atol=1e-5 * inv_t)
    weights = (exact - exact.logsumexp(1, keepdim=True)).exp()
    lse = exact.logsumexp(1).float()
    gradient = kernels.gradient(queries, keys, lse, inv_t, block_size=16)
    plain_gradient = weights.to(dtype) @ keys
    floor = FLOOR * max(1.0, inv_t)
    exact_gradient = weights @ keys.double()
    assert _error(gradient, exact_gradient) <= 2 * _error(plain_gradient, exact_gradient) + floor


def test_no_columns_sum_to_nothing() -> None:
    found = kernels.statistics(_rows(4, 8), _rows(0, 8), torch.zeros(4).long(), BOUNDED)
    assert all(torch.equal(x, torch.full((4,), -math.inf)) for x in found)
    assert _lse(_rows(4, 8), slice(2, 2), BOUNDED).shape == (0,)
    assert _gradient(_rows(4, 8), slice(2, 2), torch.ones(4), BOUNDED).shape == (0, 8)


def test_opposite_neighbours_lose_no_row_to_underflow() -> None:
    # As in test_ntxent: a maximum shared by a tile would turn a row's sum into log 0.
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 1e-3]]])
    exact, _ = nt_xent(z.double(), 0.01, implementation="reference")
    ours, _ = nt_xent(z, 0.01, implementation="triton")
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_shift_for_all_rows_holds_at_its_limit() -> None:
    # Two rows, opposite: every logit is as far below 1/tau as can be.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    inv_t = kernels.BOUNDED_INVERSE_TEMPERATURE
    assert torch.allclose(_lse(rows, slice(0, 2), inv_t), torch.tensor([-inv_t, -inv_t]))
    gradient = _gradient(rows, slice(0, 2), torch.tensor([-inv_t, -inv_t]), inv_t)
    assert torch.allclose(gradient, -2 * rows, rtol=1e-4)


@pytest.mark.parametrize("inv_t", [BOUNDED, ONLINE])
def test_nan_is_passed_on_not_hidden(inv_t: float) -> None:
    rows = _rows(20, 8)
    rows[3, 1] = math.nan
    assert _lse(rows, slice(0, 20), inv_t, 16).isnan().all()


def test_strided_rows_give_the_same() -> None:
    rows = _rows(40, 24)
    lse_N = _lse(rows, slice(0, 40), BOUNDED, 16)
    gradient = _gradient(rows, slice(0, 40), lse_N, BOUNDED, 16)
    wide = torch.full((40, 31), math.nan)
    wide[:, 3:27] = rows
    for strided in (wide[:, 3:27], rows.T.contiguous().T):
        assert not strided.is_contiguous()
        assert torch.equal(_lse(strided, slice(0, 40), BOUNDED, 16), lse_N)
        assert torch.equal(_gradient(strided, slice(0, 40), lse_N, BOUNDED, 16), gradient)


def test_the_same_input_gives_the_same_bits() -> None:
    rows = _rows(90, 24, torch.float16)
    for inv_t in (BOUNDED, ONLINE):
        first, second = (_lse(rows, slice(0, 90), inv_t, 16) for _ in range(2))
        assert torch.equal(first, second)
        one, two = (_gradient(rows, slice(0, 90), first, inv_t, 16) for _ in range(2))
        assert torch.equal(one, two)


def test_own_block_and_rectangle_kernel_agree() -> None:
    # The symmetric kernel against the plain one, which knows nothing of triangles and slots.
    rows = _rows(100, 16)
    symmetric = _lse(rows, slice(0, 100), BOUNDED, 16)
    plain, _ = kernels.statistics(rows, rows, torch.zeros(100).long(), BOUNDED, block_size=16)
    itself = rows.square().sum(1) * BOUNDED
    assert torch.allclose(symmetric, plain + torch.log1p(-(itself - plain).exp()), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(4, 513), "512 dimensions"),
        (torch.ones(4, 8, dtype=torch.float64), "float64"),
    ],
)
def test_what_is_not_supported_is_said(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _lse(rows, slice(0, 4), BOUNDED)


def test_other_mistakes_are_said() -> None:
    with pytest.raises(ValueError, match="128 rows, not 48"):
        _lse(_rows(4, 8), slice(0, 4), BOUNDED, 48)
    with pytest.raises(ValueError, match="against columns of"):
        kernels.statistics(_rows(4, 8), _rows(4, 9), torch.zeros(4).long(), BOUNDED)


def _value_and_gradient(z: torch.Tensor, loss: Any) -> tuple[float, torch.Tensor]:
    leaf = z.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_and_its_gradient(
    dtype: torch.dtype, temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch._say.cache_clear()
    caplog.set_level(logging.DEBUG, logger="kernels.dispatch")
    # Unlike views: where all is learnt the gradient is the difference of equal numbers.
    z = torch.randn(2, 19, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, exact_gradient = _value_and_gradient(
        z.double(), lambda x: nt_xent(x, temperature, implementation="reference")[0]
    )
    plain, plain_gradient = _value_and_gradient(
        z, lambda x: nt_xent(x, temperature, implementation="reference")[0]
    )
    value, gradient = _value_and_gradient(
        z, lambda x: nt_xent(x, temperature, implementation="triton", block_size=16)[0]
    )
    assert abs(value - exact) <= 2 * abs(plain - exact) + 1e-5 * max(1, abs(exact))
    assert _error(gradient, exact_gradient) <= 2 * _error(plain_gradient, exact_gradient) + 1e-4
    assert "ntxent: triton: as asked" in caplog.messages
    near = torch.stack([z[0], z[1] + 0.7 * z[0]])
    _, hits = nt_xent(near.double(), temperature, implementation="reference")
    _, ours = nt_xent(near, temperature, implementation="triton", block_size=16)
    assert 0 < hits < 1
    assert abs(ours - hits) <= 2 / 38  # rounding may decide a close one


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("rows", [1, 20])
def test_rows_that_overflow_are_passed_on_not_hidden(rows: int, temperature: float) -> None:
    z = torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0))
    z[:, :rows] *= 1e19
    losses: list[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = [
        lambda x: nt_xent(x, temperature, implementation="triton"),
        lambda x: info_nce(x[0], x[1], temperature, implementation="triton"),
    ]
    for loss in losses:
        leaf = z.clone().requires_grad_()
        value, hits = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        assert math.isnan(value.item()) and hits.item() == 0
        assert bool(leaf.grad[0, :rows].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_sided_info_nce_and_both_gradients(dtype: torch.dtype) -> None:
    queries, keys = _rows(22, 20, seed=3).to(dtype), _rows(9, 20, seed=4).to(dtype)
    positive = torch.arange(22) % 9

    def run(queries: torch.Tensor, keys: torch.Tensor, how: Any) -> list[torch.Tensor]:
        leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
        value, _ = two_sided(*leaves, positive, 0.2, implementation=how)
        gradients = torch.autograd.grad(value, leaves)
        return [value.detach().double(), *(each.double() for each in gradients)]

    exact = run(queries.double(), keys.double(), "blocked")
    most = {torch.float32: 1e-5}.get(dtype, 1e-2)
    for mine, other in zip(run(queries, keys, "triton"), exact):
        assert float((mine - other).norm() / other.norm()) < most


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_info_nce_and_its_gradient(dtype: torch.dtype, with_queue: bool) -> None:
    queries, keys = _rows(22, 20, seed=3).to(dtype), _rows(22, 20, seed=4).to(dtype)
    queue = _rows(45, 20, seed=5).to(dtype) if with_queue else None
    hits: list[torch.Tensor | None] = []

    def loss(x: torch.Tensor, implementation: Any) -> torch.Tensor:
        wide = None if queue is None else queue.to(x.dtype)
        value, accuracy = info_nce(
            x,
            keys.to(x.dtype),
            0.2,
            queue_QD=wide,
            implementation=implementation,
        )
        hits.append(accuracy)
        return value

    exact, exact_gradient = _value_and_gradient(queries.double(), lambda x: loss(x, "reference"))
    plain, plain_gradient = _value_and_gradient(queries, lambda x: loss(x, "reference"))
    value, gradient = _value_and_gradient(queries, lambda x: loss(x, "triton"))
    assert abs(value - exact) <= 2 * abs(plain - exact) + 1e-6
    assert _error(gradient, exact_gradient) <= 2 * _error(plain_gradient, exact_gradient) + 1e-5
    assert hits[0] is not None
    assert hits[2] is not None
    assert hits[2].item() == pytest.approx(hits[0].item())


@pytest.mark.parametrize("inv_t", [BOUNDED, ONLINE])
def test_plain_torch_has_the_same_contract(inv_t: float) -> None:
    all_ND, own, positive = _rows(50, 16), slice(10, 40), torch.arange(30).roll(15)
    rows = all_ND[own]
    for columns, symmetric in ((rows, True), (all_ND, False)):
        ours = kernels.statistics(rows, columns, positive, inv_t, symmetric=symmetric)
        plain = cpu.statistics(rows, columns, positive, inv_t, symmetric=symmetric)
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6 * inv_t)
    every = torch.zeros(50).long()
    lse_N, _ = cpu.statistics(all_ND, all_ND, every, inv_t, symmetric=True)
    for lse, place in ((lse_N, own), (lse_N[own], None)):
        ours_MD = kernels.gradient(rows, all_ND, lse, inv_t, own=place)
        plain_MD = cpu.gradient(rows, all_ND, lse, inv_t, own=place)
        assert torch.allclose(ours_MD, plain_MD, rtol=1e-6 * inv_t, atol=1e-6 * inv_t)
