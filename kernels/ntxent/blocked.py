"""NT-Xent tile by tile, in plain torch: the N x N matrix never exists. Any device, any dtype.

A rank computes its M rows against all N columns. Among its own rows the matrix is symmetric, so of
that M x M block only the tiles on and above the diagonal are computed and each of the others is
read off as a transpose: half the work, and on one process that block is the whole matrix.

Shapes: N rows of all ranks, M own rows, D dimensions, m x n a tile.
Everything but the factors of a matrix product is float32, or float64 for float64 rows.

Similarities of unit rows lie between -1/tau and 1/tau. At the usual temperatures their exponentials
and the sums of these are numbers that float32 holds, so no maximum is taken first: one exponential
per pair of rows serves both passes, as ``p_ij + p_ji = exp(s_ij) (exp(-lse_i) + exp(-lse_j))``. Far
colder ones subtract what keeps every number finite, which costs about twice the time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernels.ntxent.products import WARM, add_product, factors, multiply, products_of
from kernels.ntxent.reference import statistics_dtype
from kernels.ntxent.rivals import without_positives


class _Tile(NamedTuple):
    rows: slice  # among the own rows
    columns: slice  # among all rows
    mirror: slice | None  # `columns` among the own rows, where the tile also serves transposed
    on_diagonal: bool


_Tiles = Iterator[tuple[_Tile, torch.Tensor]]


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
        ``(M,)`` float32 (float64 for float64 rows), finite at any temperature.
    """
    return row_statistics(all_ND, own, inv_temperature, block_size=block_size)[0]


def row_statistics(
    all_ND: torch.Tensor,
    own: slice,
    inv_temperature: float,
    positive_M: torch.Tensor | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`row_logsumexp`, and each row's largest logit but its positive's, in the same pass.

    Args:
        all_ND: as in :func:`row_logsumexp`.
        own: as there.
        inv_temperature: as there.
        positive_M: int64, each own row's positive, counted from the first own row; the positive of
            a row's positive is the row.
        block_size: as there.

    Returns:
        ``(M,)`` log-sum-exps, and ``(M,)`` rivals' logits, ``None`` without ``positive_M``; both
        float32 (float64 for float64 rows).
    """
    logsumexp = _warm_logsumexp if inv_temperature <= WARM else _cold_logsumexp
    result_M = torch.empty(
        own.stop - own.start, dtype=statistics_dtype(all_ND.dtype), device=all_ND.device
    )
    rival_M = None if positive_M is None else torch.full_like(result_M, float("-inf"))
    with products_of(all_ND):
        tiles = _logits(all_ND, own, inv_temperature, block_size)
        if positive_M is not None and rival_M is not None:
            tiles = _noting_rivals(tiles, positive_M + own.start, rival_M)
        return logsumexp(tiles, result_M), rival_M


def _noting_rivals(tiles: _Tiles, positive_M: torch.Tensor, rival_M: torch.Tensor) -> _Tiles:
    """The same tiles; on their way, the rows' largest logits but the positives' go to ``rival_M``.

    A row's positive has that row as its own, so what hides the rows' positives of a tile hides
    those of its transpose.
    """
    for tile, logits_mn in tiles:
        with without_positives(logits_mn, positive_M[tile.rows], tile.columns.start) as others_mn:
            rows, mirror = tile.rows, tile.mirror
            rival_M[rows] = torch.maximum(rival_M[rows], others_mn.amax(1))
            if mirror is not None:
                rival_M[mirror] = torch.maximum(rival_M[mirror], others_mn.amax(0))
        yield tile, logits_mn


def _warm_logsumexp(tiles: _Tiles, result_M: torch.Tensor) -> torch.Tensor:
    result_M.zero_()
    for tile, logits_mn in tiles:
        exp_mn = logits_mn.exp_()
        result_M[tile.rows] += exp_mn.sum(1)
        if tile.mirror is not None:
            result_M[tile.mirror] += exp_mn.sum(0)
    return result_M.log_()


def _cold_logsumexp(tiles: _Tiles, result_M: torch.Tensor) -> torch.Tensor:
    """A log-sum-exp of the tiles' log-sum-exps, each with its rows' maxima subtracted."""
    result_M.fill_(float("-inf"))
    for tile, logits_mn in tiles:
        result_M[tile.rows] = torch.logaddexp(result_M[tile.rows], logits_mn.logsumexp(1))
        if tile.mirror is not None:
            result_M[tile.mirror] = torch.logaddexp(result_M[tile.mirror], logits_mn.logsumexp(0))
    return result_M


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
    columns_ND = factors(all_ND)  # once: in bfloat16 it is a copy
    rows_MD = columns_ND[own]
    grad_MD = torch.zeros(rows_MD.shape, dtype=lse_N.dtype, device=all_ND.device)
    weights = _warm_weights if inv_temperature <= WARM else _cold_weights
    with products_of(all_ND):
        for tile, logits_mn in _logits(columns_ND, own, inv_temperature, block_size):
            weight_mn = weights(logits_mn, lse_N[own][tile.rows], lse_N[tile.columns])
            weight_mn = weight_mn.to(all_ND.dtype) if all_ND.is_cuda else weight_mn
            add_product(grad_MD[tile.rows], weight_mn, columns_ND[tile.columns])
            if tile.mirror is not None:
                add_product(grad_MD[tile.mirror], weight_mn.T, rows_MD[tile.rows])
    return grad_MD


def _warm_weights(
    logits_mn: torch.Tensor, lse_m: torch.Tensor, lse_n: torch.Tensor
) -> torch.Tensor:
    """``p_ij + p_ji`` in place of the logits, with one exponential for both."""
    share_mn = lse_m.neg().exp_()[:, None] + lse_n.neg().exp_()
    return logits_mn.exp_().mul_(share_mn)


def _cold_weights(
    logits_mn: torch.Tensor, lse_m: torch.Tensor, lse_n: torch.Tensor
) -> torch.Tensor:
    """``p_ij + p_ji``, each from an exponent that cannot overflow."""
    weight_mn = (logits_mn - lse_m[:, None]).exp_()
    weight_mn += logits_mn.sub_(lse_n).exp_()
    return weight_mn


def _logits(
    all_ND: torch.Tensor, own: slice, inv_temperature: float, block_size: int | None
) -> _Tiles:
    """Every tile with its logits ``(m, n)``, those of a row with itself at minus infinity.

    All tiles share one buffer: a consumer may overwrite it, and must be done with it when it asks
    for the next.
    """
    block = block_size or (4096 if all_ND.is_cuda else 512)
    dtype = statistics_dtype(all_ND.dtype)
    columns_ND = factors(all_ND)
    rows_MD = columns_ND[own]
    buffer = torch.empty(
        min(block, len(rows_MD)) * min(block, len(all_ND)), dtype=dtype, device=all_ND.device
    )
    for tile in _tiles(own, len(all_ND), block):
        rows_mD, columns_nD = rows_MD[tile.rows], columns_ND[tile.columns]
        logits_mn = buffer[: len(rows_mD) * len(columns_nD)].view(len(rows_mD), len(columns_nD))
        multiply(rows_mD, columns_nD.T, inv_temperature, logits_mn)
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
