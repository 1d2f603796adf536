"""Rows against columns that are not the rows, tile by tile, in plain torch. Any device, any dtype.

What :mod:`kernels.ntxent.blocked` is for the symmetric matrix, for a rectangle of it: other ranks'
rows, MoCo's keys, MoCo's queue. Nothing is left out and nothing is symmetric.

Shapes: M rows, N columns, D dimensions, m x n a tile.
Everything but the factors of a matrix product is float32, or float64 for float64 rows.
"""

from collections.abc import Iterator

import torch

from kernels.ntxent.products import WARM, add_product, factors, multiply, products_of
from kernels.ntxent.reference import statistics_dtype
from kernels.ntxent.rivals import without_positives

_TILE = {"cuda": 4096, "cpu": 512}


def cross_statistics(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    inv_temperature: float,
    positive_M: torch.Tensor | None = None,
    block_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``log sum_j exp(u_i . v_j / tau)``, and each row's largest logit but its positive's.

    Args:
        rows_MD: rows, any floating dtype.
        columns_ND: columns, the same dtype.
        inv_temperature: 1 / tau.
        positive_M: int64, each row's positive among the columns, -1 where it is none of them;
            ``None`` asks for no rivals.
        block_size: rows and columns of a tile; ``None`` chooses by device.

    Returns:
        ``(M,)`` log-sum-exps and ``(M,)`` rivals' logits, float32 (float64 for float64 rows), minus
        infinity where there are no columns; ``None`` without ``positive_M``.
    """
    dtype = statistics_dtype(rows_MD.dtype)
    lse_M = torch.full((len(rows_MD),), float("-inf"), dtype=dtype, device=rows_MD.device)
    rival_M = None if positive_M is None else lse_M.clone()
    with products_of(rows_MD):
        for rows, columns, logits_mn in _logits(rows_MD, columns_ND, inv_temperature, block_size):
            if positive_M is not None and rival_M is not None:
                with without_positives(logits_mn, positive_M[rows], columns.start) as others_mn:
                    rival_M[rows] = torch.maximum(rival_M[rows], others_mn.amax(1))
            if inv_temperature <= WARM:
                part_m = logits_mn.exp_().sum(1).log_()
            else:
                part_m = logits_mn.logsumexp(1)
            lse_M[rows] = torch.logaddexp(lse_M[rows], part_m)
    return lse_M, rival_M


def cross_gradient(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    lse_M: torch.Tensor,
    inv_temperature: float,
    block_size: int | None = None,
) -> torch.Tensor:
    """``sum_j exp(u_i . v_j / tau - lse_i) v_j``: tau times the derivative of ``lse_i`` by row i.

    Args:
        rows_MD: as in :func:`cross_statistics`.
        columns_ND: as there; they take no gradient.
        lse_M: each row's log-sum-exp, over these columns and whatever else it was taken over.
        inv_temperature: 1 / tau.
        block_size: as there.

    Returns:
        ``(M, D)`` float32 (float64 for float64 rows).
    """
    gradient_MD = torch.zeros(rows_MD.shape, dtype=lse_M.dtype, device=rows_MD.device)
    factors_ND = factors(columns_ND)  # once: in bfloat16 it is a copy
    with products_of(rows_MD):
        for rows, columns, logits_mn in _logits(rows_MD, factors_ND, inv_temperature, block_size):
            weight_mn = logits_mn.sub_(lse_M[rows, None]).exp_()
            weight_mn = weight_mn.to(rows_MD.dtype) if rows_MD.is_cuda else weight_mn
            add_product(gradient_MD[rows], weight_mn, factors_ND[columns])
    return gradient_MD


def _logits(
    rows_MD: torch.Tensor,
    columns_ND: torch.Tensor,
    inv_temperature: float,
    block_size: int | None,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Every tile's rows, columns and logits ``(m, n)``, which its consumer may overwrite."""
    block = block_size or _TILE.get(rows_MD.device.type, 512)
    rows_MD, columns_ND = factors(rows_MD), factors(columns_ND)
    buffer = torch.empty(
        min(block, len(rows_MD)) * min(block, len(columns_ND)),
        dtype=statistics_dtype(rows_MD.dtype),
        device=rows_MD.device,
    )
    for first_row in range(0, len(rows_MD), block):
        rows = slice(first_row, min(first_row + block, len(rows_MD)))
        for first_column in range(0, len(columns_ND), block):
            columns = slice(first_column, min(first_column + block, len(columns_ND)))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits_mn = buffer[: shape[0] * shape[1]].view(shape)
            multiply(rows_MD[rows], columns_ND[columns].T, inv_temperature, logits_mn)
            yield rows, columns, logits_mn
