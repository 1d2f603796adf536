"""NT-Xent tile by tile, in plain torch: the N x N matrix never exists. Any device, any dtype.

A rank computes its M rows against all N columns. Among its own rows the matrix is symmetric, so of
that M x M block only the tiles on and above the diagonal are computed and each of the others is
read off as a transpose: half the work, and on one process that block is the whole matrix.

Shapes: N rows of all ranks, M own rows, D dimensions, m x n a tile.
Everything but the factors of a matrix product is float32, or float64 for float64 rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernels.ntxent.reference import statistics_dtype


class _Tile(NamedTuple):
    rows: slice  # among the own rows
    columns: slice  # among all rows
    mirror: slice | None  # `columns` among the own rows, where the tile also serves transposed
    on_diagonal: bool


def row_logsumexp(
    all_ND: torch.Tensor, own: slice, inv_temperature: float, block_size: int | None = None
) -> torch.Tensor:
    """``log sum_{j != i} exp(u_i . u_j / tau)`` for the own rows i, over all rows j.

    Args:
        all_ND: unit rows of all ranks, any floating dtype.
        own: this rank's rows among them.
        inv_temperature: 1 / tau.
        block_size: rows and columns of a tile; ``None`` chooses by device.

    Returns:
        ``(M,)`` float32 (float64 for float64 rows). A log-sum-exp of the tiles' log-sum-exps, each
        taken with its rows' maxima subtracted: finite at any temperature.
    """
    own_MD = all_ND[own]
    dtype = statistics_dtype(all_ND.dtype)
    lse_M = torch.full((len(own_MD),), float("-inf"), dtype=dtype, device=all_ND.device)
    for tile, logits_mn in _logits(all_ND, own, inv_temperature, block_size):
        lse_M[tile.rows] = torch.logaddexp(lse_M[tile.rows], logits_mn.logsumexp(1))
        if tile.mirror is not None:
            lse_M[tile.mirror] = torch.logaddexp(lse_M[tile.mirror], logits_mn.logsumexp(0))
    return lse_M


def row_gradient(
    all_ND: torch.Tensor,
    own: slice,
    lse_N: torch.Tensor,
    inv_temperature: float,
    block_size: int | None = None,
) -> torch.Tensor:
    """``sum_{j != i} (p_ij + p_ji) u_j`` for the own rows i.

    With ``p_ij = exp(u_i . u_j / tau - lse_i)`` that is tau times the derivative, by row i, of the
    sum of *all* rows' log-sum-exps: i is a row of the matrix (``p_ij``) and a column of every other
    row (``p_ji``). Besides the rows, only ``lse_N`` is needed from the other ranks.

    Args:
        all_ND: as in :func:`row_logsumexp`.
        own: as there.
        lse_N: what :func:`row_logsumexp` returned, for all rows.
        inv_temperature: 1 / tau.
        block_size: as there.

    Returns:
        ``(M, D)`` float32 (float64 for float64 rows).
    """
    own_MD = all_ND[own]
    lse_M = lse_N[own]
    grad_MD = torch.zeros(own_MD.shape, dtype=lse_N.dtype, device=all_ND.device)
    for tile, logits_mn in _logits(all_ND, own, inv_temperature, block_size):
        weight_mn = (logits_mn - lse_M[tile.rows, None]).exp_()
        weight_mn += logits_mn.sub_(lse_N[tile.columns]).exp_()
        weight_mn = weight_mn.to(all_ND.dtype) if all_ND.is_cuda else weight_mn
        grad_MD[tile.rows] += _product(weight_mn, all_ND[tile.columns])
        if tile.mirror is not None:
            grad_MD[tile.mirror] += _product(weight_mn.T, own_MD[tile.rows])
    return grad_MD


def _logits(
    all_ND: torch.Tensor, own: slice, inv_temperature: float, block_size: int | None
) -> Iterator[tuple[_Tile, torch.Tensor]]:
    """Every tile with its logits ``(m, n)``, those of a row with itself at minus infinity.

    All tiles share one buffer: a consumer may overwrite it, and must be done with it when it asks
    for the next.
    """
    own_MD = all_ND[own]
    block = block_size or (4096 if all_ND.is_cuda else 1024)
    dtype = statistics_dtype(all_ND.dtype)
    buffer = torch.empty(
        min(block, len(own_MD)) * min(block, len(all_ND)), dtype=dtype, device=all_ND.device
    )
    for tile in _tiles(own, len(all_ND), block):
        rows_mD, columns_nD = own_MD[tile.rows], all_ND[tile.columns]
        logits_mn = buffer[: len(rows_mD) * len(columns_nD)].view(len(rows_mD), len(columns_nD))
        _product(rows_mD, columns_nD.T, out=logits_mn).mul_(inv_temperature)
        if tile.on_diagonal:
            logits_mn.fill_diagonal_(float("-inf"))
        yield tile, logits_mn


def _tiles(own: slice, count: int, block: int) -> Iterator[_Tile]:
    """The upper triangle of the own block, then what lies left and right of it."""
    for rows in _spans(own.start, own.stop, block):
        local = slice(rows.start - own.start, rows.stop - own.start)
        yield _Tile(local, rows, None, on_diagonal=True)
        for columns in _spans(rows.stop, own.stop, block):
            mirror = slice(columns.start - own.start, columns.stop - own.start)
            yield _Tile(local, columns, mirror, on_diagonal=False)
        for columns in (*_spans(0, own.start, block), *_spans(own.stop, count, block)):
            yield _Tile(local, columns, None, on_diagonal=False)


def _spans(start: int, stop: int, block: int) -> Iterator[slice]:
    for first in range(start, stop, block):
        yield slice(first, min(first + block, stop))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b``, summed and returned in the statistics' dtype.

    CUDA multiplies 16-bit factors on tensor cores and hands back the float32 sums. The CPU would
    round the product to 16 bits (at tau = 0.1 an error of 0.04 in a logit), so there the factors
    are widened first.
    """
    dtype = statistics_dtype(b.dtype)
    if b.dtype != dtype and b.is_cuda:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)
