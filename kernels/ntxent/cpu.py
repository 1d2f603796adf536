"""Statistics and gradient tile by tile, in plain torch: the N x N matrix never exists.

Fast on CPUs; any device and dtype. :mod:`kernels.ntxent.triton` keeps the same contract.

Where the columns are the rows the matrix is symmetric: only tiles on and above the diagonal are
computed and each of the others is read off as a transpose. That is half the work, and on one
process all of it.

Similarities of unit rows lie between -1/tau and 1/tau. At the usual temperatures their exponentials
and the sums of these are numbers that float32 holds, so no maximum is taken first: one exponential
per pair of rows serves both passes, as ``p_ij + p_ji = exp(s_ij) (exp(-lse_i) + exp(-lse_j))``. Far
colder ones subtract what keeps every number finite, which costs about twice the time.

Shapes: M rows, N columns, D dimensions, m x n a tile. Everything but the factors of a matrix
product is float32, or float64 for float64 rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch

from kernels.ntxent.reference import statistics_dtype

WARM = 60.0
"""Largest 1/tau whose exponentials need no maximum subtracted: exp(60) times a billion and exp(-60)
over a billion are float32 numbers with all their digits."""


def statistics(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    positive_M: torch.Tensor,
    inv_temperature: float,
    *,
    symmetric: bool = False,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exps of the rows' logits ``u_i . v_j / tau``, and the hardest negatives' logits.

    Args:
        rows_MD: unit rows.
        columns_ND: unit rows of the same dtype.
        positive_M: int64, each row's positive among the columns; any other number where it is none
            of them.
        inv_temperature: 1 / tau.
        symmetric: the columns are the rows: each leaves itself out, and the positive of a row's
            positive is the row.
        block_size: rows and columns of a tile; ``None`` chooses by device.

    Returns:
        ``(M,)`` log-sum-exps, finite at any temperature, and ``(M,)`` largest logits but the
        positives', float32 (float64 for float64 rows); minus infinity where there are no columns.
    """
    warm = inv_temperature <= WARM
    sums = warm and symmetric  # of exponentials; else running log-sum-exps
    dtype = statistics_dtype(rows_MD.dtype)
    hardest_M = torch.full((len(rows_MD),), float("-inf"), dtype=dtype, device=rows_MD.device)
    result_M = torch.zeros_like(hardest_M) if sums else hardest_M.clone()
    own = slice(0, len(rows_MD)) if symmetric else None
    with _products_of(rows_MD):
        rows = _factors(rows_MD)
        columns = rows if symmetric else _factors(columns_ND)
        for tile, logits_mn in _tiles(rows, columns, inv_temperature, own, block_size):
            with _without_positives(logits_mn, positive_M[tile.rows], tile.columns.start):
                for along, axis in tile.sides():
                    hardest_M[along] = torch.maximum(hardest_M[along], logits_mn.amax(axis))
            if warm:
                logits_mn.exp_()
            for along, axis in tile.sides():
                if sums:
                    result_M[along] += logits_mn.sum(axis)
                    continue
                part = logits_mn.sum(axis).log_() if warm else logits_mn.logsumexp(axis)
                result_M[along] = torch.logaddexp(result_M[along], part)
    return result_M.log_() if sums else result_M, hardest_M


def gradient(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse: torch.Tensor,
    inv_temperature: float,
    *,
    own: slice | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """``sum_j p_ij v_j`` with ``p_ij = exp(u_i . v_j / tau - lse_i)``.

    That is tau times the derivative of ``lse_i`` by row i.

    Args:
        rows_MD: as in :func:`statistics`.
        columns_ND: as there.
        lse: ``(M,)`` each row's log-sum-exp, over these columns and whatever else.
        inv_temperature: as there.
        own: the columns are all rows, and these the ones of ``rows_MD``. Row i is then a row of the
            matrix (``p_ij``) and a column of every other row (``p_ji``): the sum is
            ``sum_{j != i} (p_ij + p_ji) v_j``, for which ``lse`` is that of all, ``(N,)``.
        block_size: as there.

    Returns:
        ``(M, D)`` in the dtype of ``lse``.
    """
    gradient_MD = torch.zeros(rows_MD.shape, dtype=lse.dtype, device=rows_MD.device)
    lse_M = lse if own is None else lse[own]
    with _products_of(rows_MD):
        columns = _factors(columns_ND)
        rows = _factors(rows_MD) if own is None else columns[own]
        for tile, logits_mn in _tiles(rows, columns, inv_temperature, own, block_size):
            lse_n = None if own is None else lse[tile.columns]
            weight_mn = _weights(logits_mn, lse_M[tile.rows], lse_n, inv_temperature <= WARM)
            weight_mn = weight_mn.to(columns.dtype)
            _add_product(gradient_MD[tile.rows], weight_mn, columns[tile.columns])
            if tile.mirror is not None:
                _add_product(gradient_MD[tile.mirror], weight_mn.T, rows[tile.rows])
    return gradient_MD


def _weights(
    logits_mn: torch.Tensor, lse_m: torch.Tensor, lse_n: torch.Tensor | None, warm: bool
) -> torch.Tensor:
    """``p_ij``, with ``lse_n`` ``p_ij + p_ji``, none of which overflows; the logits are lost."""
    if lse_n is None:
        return logits_mn.sub_(lse_m[:, None]).exp_()
    if warm:
        share_mn = lse_m.neg().exp_()[:, None] + lse_n.neg().exp_()
        return logits_mn.exp_().mul_(share_mn)
    weight_mn = (logits_mn - lse_m[:, None]).exp_()
    return weight_mn.add_(logits_mn.sub_(lse_n).exp_())


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    mirror: slice | None  # `columns` among the rows, where the tile also serves transposed

    def sides(self) -> list[tuple[slice, int]]:
        """Rows, and the axis of the tile along which their logits lie."""
        return [(self.rows, 1)] + ([] if self.mirror is None else [(self.mirror, 0)])


def _tiles(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    inv_temperature: float,
    own: slice | None,
    block_size: int | None,
) -> Iterator[tuple[_Tile, torch.Tensor]]:
    """Every tile with its logits ``(m, n)``, those of a row with itself at minus infinity.

    With ``own``, where the rows stand among the columns, it is the upper triangle of that block and
    what lies left and right of it. All tiles share one buffer: a consumer may overwrite it, and
    must be done with it when it asks for the next.
    """
    block = block_size or (4096 if rows_MD.is_cuda else 512)
    count = len(columns_ND)
    dtype = statistics_dtype(rows_MD.dtype)
    buffer = torch.empty(
        min(block, len(rows_MD)) * min(block, count), dtype=dtype, device=rows_MD.device
    )
    for rows in _spans(0, len(rows_MD), block):
        spans = _spans(0, count, block)
        if own is not None:
            diagonal = own.start + rows.start
            left_and_right = _spans(0, own.start, block), _spans(own.stop, count, block)
            spans = chain(_spans(diagonal, own.stop, block), *left_and_right)
        for columns in spans:
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits_mn = buffer[: shape[0] * shape[1]].view(shape)
            _multiply(rows_MD[rows], columns_ND[columns].T, inv_temperature, logits_mn)
            mirror = None
            if own is not None and columns.start == diagonal:
                logits_mn.fill_diagonal_(float("-inf"))
            elif own is not None and diagonal < columns.start < own.stop:
                mirror = slice(columns.start - own.start, columns.stop - own.start)
            yield _Tile(rows, columns, mirror), logits_mn


def _spans(start: int, stop: int, block: int) -> Iterator[slice]:
    for first in range(start, stop, block):
        yield slice(first, min(first + block, stop))


@contextmanager
def _without_positives(
    logits_mn: torch.Tensor, positive_m: torch.Tensor, first_column: int
) -> Iterator[None]:
    """The positives' logits of a tile at minus infinity for now, and then as they were.

    Writes and restores ``m`` numbers instead of masking a copy of the tile, and waits for none. In
    a symmetric block a row's positive has that row as its own: it hides those of the transpose too.
    """
    index_m1 = (positive_m - first_column)[:, None]
    inside_m1 = (index_m1 >= 0) & (index_m1 < logits_mn.shape[1])
    index_m1 = index_m1.clamp(0, logits_mn.shape[1] - 1)
    kept_m1 = logits_mn.gather(1, index_m1)
    logits_mn.scatter_(1, index_m1, kept_m1.masked_fill(inside_m1, float("-inf")))
    yield
    logits_mn.scatter_(1, index_m1, kept_m1)


# --- matrix products: 16-bit factors, sums in float32, fast on CPUs too ---------------------------


def _factors(rows: torch.Tensor) -> torch.Tensor:
    """Rows as factors of products whose sums are wanted in the statistics' dtype.

    CUDA multiplies 16-bit factors and hands back float32 sums. The CPU's product of such factors
    is rounded to 16 bits (at tau = 0.1 an error of 0.04 in a logit), so there they are widened.
    """
    return rows if rows.is_cuda else rows.to(statistics_dtype(rows.dtype))


def _multiply(a: torch.Tensor, b: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """``out = alpha a @ b``."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out).mul_(alpha)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


@contextmanager
def _products_of(rows: torch.Tensor) -> Iterator[None]:
    """Let the CPU's matrix unit (AMX) multiply what came as bfloat16: three times the speed.

    oneDNN rounds float32 factors to bfloat16, which rows that were bfloat16 do not notice, and sums
    in float32. Weights are rounded as on a GPU. The switch is the process's own: for as long as
    this lasts it holds for float32 products of other threads too.
    """
    if rows.is_cuda or rows.dtype != torch.bfloat16 or not _has_matrix_unit():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _has_matrix_unit() -> bool:
    return torch.cpu.get_capabilities().get("amx_bf16", False)
