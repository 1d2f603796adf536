"""The Triton kernels of :mod:`kernels.ntxent.triton`, which says what they share and why.

Counts are not specialised on: Triton would compile a kernel anew, with other registers, for a count
of 1 or a multiple of 16, and no inspection of the machine code would have seen it. Strides and
dimensions are multiples of 16 always.

Shapes: M rows against N columns, D dimensions, m x n a tile, k a chunk of the dimensions. ``rows``
and ``columns`` are matrices of unit rows: (pointer, count, stride).
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(matrix, first, first_d, SIZE_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and dimensions from ``first, first_d`` as ``(BLOCK, BLOCK_D)``, zeros beyond them."""
    pointer, count, stride = matrix
    row = tl.arange(0, BLOCK)
    d = first_d + tl.arange(0, BLOCK_D)
    inside = (row < count - first)[:, None]
    if SIZE_D % BLOCK_D != 0:
        inside = inside & (d < SIZE_D)[None, :]
    # 64 bits for where the tile begins: N * D may pass 2^31, offsets within a tile do not.
    base = pointer + tl.cast(first, tl.int64) * stride
    return tl.load(base + row[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _products(
    rows_mk,
    rows,
    first_row,
    columns,
    first_column,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``u_i . v_j`` of a tile, and the first ``CHUNK`` dimensions of its columns.

    ``rows_mk`` are those of its rows. Where they are not all, for float32 rows fill the registers,
    rows and columns are read a chunk at a time.
    """
    columns_nk = _load(columns, first_column, 0, SIZE_D, BLOCK_N, CHUNK)
    if CHUNK >= SIZE_D:
        products_mn = tl.dot(rows_mk, tl.trans(columns_nk), input_precision=PRECISION)
    else:
        products_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_d in range(0, SIZE_D, CHUNK):
            more_mk = _load(rows, first_row, first_d, SIZE_D, BLOCK_M, CHUNK)
            more_nk = _load(columns, first_column, first_d, SIZE_D, BLOCK_N, CHUNK)
            products_mn = tl.dot(more_mk, tl.trans(more_nk), products_mn, input_precision=PRECISION)
    return products_mn, columns_nk


@triton.jit
def _nothing(BLOCK: tl.constexpr):
    """Statistics of no logits: sums of ``exp2``, their maxima, largest logits of negatives."""
    lowest = tl.full((BLOCK,), float("-inf"), tl.float32)
    return tl.zeros((BLOCK,), tl.float32), lowest, lowest


@triton.jit
def _add_tile(total, maximum, logits_mn, shift, AXIS: tl.constexpr, ONLINE: tl.constexpr):
    """Sums and maxima with a tile's logits along ``AXIS`` added.

    Sums are relative to their maximum; with ``ONLINE`` off to ``shift``, which no logit exceeds,
    and the maxima are not kept.
    """
    if ONLINE:
        larger = tl.maximum(maximum, tl.max(logits_mn, AXIS))
        # No logit yet: any finite reference gives the sum 0, where -inf - -inf would be NaN.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weights_mn = tl.exp2(logits_mn - tl.expand_dims(reference, AXIS))
        total = total * tl.exp2(maximum - reference) + tl.sum(weights_mn, AXIS)
        maximum = larger
    else:
        total += tl.sum(tl.exp2(logits_mn - shift), AXIS)
    return total, maximum


@triton.jit
def _add_to_slot(slots, index, inside, total, maximum, hardest, ONLINE: tl.constexpr):
    """Add statistics to those in memory. Only this program touches these addresses."""
    sums, maxima, hardests = slots
    before = tl.load(sums + index, mask=inside, other=0.0)
    if ONLINE:
        maximum_before = tl.load(maxima + index, mask=inside, other=float("-inf"))
        larger = tl.maximum(maximum, maximum_before)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(maximum - reference)
        before = before * tl.exp2(maximum_before - reference)
        tl.store(maxima + index, larger, mask=inside)
    tl.store(sums + index, before + total, mask=inside)
    hardest_before = tl.load(hardests + index, mask=inside, other=float("-inf"))
    tl.store(hardests + index, tl.maximum(hardest, hardest_before), mask=inside)


@triton.jit(do_not_specialize=["row_count", "share"])
def own_block_kernel(
    row_pointer,
    positive,
    sums,
    maxima,
    hardests,
    row_count,
    row_stride,
    scale,
    share,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of ``scale u_i . u_j``, j != i, of all rows, from the upper triangle of tiles.

    A program has two groups of ``share`` blocks of rows.
    """
    upper = tl.program_id(0)
    right = tl.program_id(1)
    if upper > right:
        return
    rows = (row_pointer, row_count, row_stride)
    slots = (sums, maxima, hardests)
    blocks = tl.cdiv(row_count, BLOCK_M)
    last_row_block = tl.minimum((upper + 1) * share, blocks)
    last_column_block = tl.minimum((right + 1) * share, blocks)
    slot_of_rows = tl.cast(right, tl.int64) * row_count
    slot_of_columns = tl.cast(upper, tl.int64) * row_count
    for row_block in range(upper * share, last_row_block):
        first_row = row_block * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        rows_mk = _load(rows, first_row, 0, SIZE_D, BLOCK_M, CHUNK)
        total, maximum, hardest = _nothing(BLOCK_M)
        positive_m = tl.load(positive + row, mask=row < row_count, other=-1)
        for column_block in range(tl.maximum(row_block, right * share), last_column_block):
            first = column_block * BLOCK_M
            column = first + tl.arange(0, BLOCK_M)
            logits_mn, _ = _products(
                rows_mk, rows, first_row, rows, first, SIZE_D, CHUNK, BLOCK_M, BLOCK_M, PRECISION
            )
            logits_mn *= scale
            pair = (row < row_count)[:, None] & (column < row_count)[None, :]
            pair = pair & (row[:, None] != column[None, :])
            logits_mn = tl.where(pair, logits_mn, float("-inf"))
            # On the diagonal the tile is its own transpose: its rows are its columns.
            mirrored = (column < row_count) & (column_block != row_block)
            total, maximum = _add_tile(total, maximum, logits_mn, scale, 1, ONLINE)
            total_n, maximum_n, _ = _nothing(BLOCK_M)
            total_n, maximum_n = _add_tile(total_n, maximum_n, logits_mn, scale, 0, ONLINE)
            # A row's positive has that row as its own: this hides those of the transpose too. Not
            # before the sums: a second tile would take registers.
            positives_mn = positive_m[:, None] == column[None, :]
            negatives_mn = tl.where(positives_mn, float("-inf"), logits_mn)
            hardest = tl.maximum(hardest, tl.max(negatives_mn, 1))
            hardest_n = tl.max(negatives_mn, 0)
            _add_to_slot(
                slots, slot_of_columns + column, mirrored, total_n, maximum_n, hardest_n, ONLINE
            )
        # Within a group these rows were columns before: other threads may have written their slot.
        tl.debug_barrier()
        _add_to_slot(slots, slot_of_rows + row, row < row_count, total, maximum, hardest, ONLINE)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["row_count", "column_count"])
def rectangle_kernel(
    row_pointer,
    column_pointer,
    positive,
    sums,
    maxima,
    hardests,
    row_count,
    column_count,
    row_stride,
    column_stride,
    scale,
    share,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of ``scale u_i . v_j`` of a block of rows over ``share`` columns."""
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    rows = (row_pointer, row_count, row_stride)
    columns = (column_pointer, column_count, column_stride)
    rows_mk = _load(rows, first_row, 0, SIZE_D, BLOCK_M, CHUNK)
    total, maximum, hardest = _nothing(BLOCK_M)
    positive_m = tl.load(positive + row, mask=row < row_count, other=-1)
    begin = split * share
    end = tl.minimum(begin + share, column_count)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        logits_mn, _ = _products(
            rows_mk, rows, first_row, columns, first, SIZE_D, CHUNK, BLOCK_M, BLOCK_N, PRECISION
        )
        logits_mn *= scale
        logits_mn = tl.where((column < column_count)[None, :], logits_mn, float("-inf"))
        total, maximum = _add_tile(total, maximum, logits_mn, scale, 1, ONLINE)
        negatives_mn = tl.where(positive_m[:, None] == column[None, :], float("-inf"), logits_mn)
        hardest = tl.maximum(hardest, tl.max(negatives_mn, 1))
    index = tl.cast(split, tl.int64) * row_count + row
    tl.store(sums + index, total, mask=row < row_count)
    if ONLINE:
        tl.store(maxima + index, maximum, mask=row < row_count)
    tl.store(hardests + index, hardest, mask=row < row_count)


@triton.jit(do_not_specialize=["row_count", "column_count", "own_start"])
def gradient_kernel(
    row_pointer,
    column_pointer,
    row_lse,
    column_lse,
    gradient,
    row_count,
    column_count,
    row_stride,
    column_stride,
    own_start,
    scale,
    share,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum_j w_ij v_j`` of a block of rows over ``share`` columns, ``CHUNK`` dimensions.

    ``w_ij = exp(s_ij - lse_i)``. With ``OWN`` row i is column ``own_start + i``, which is left out,
    and the weights are ``exp(s_ij - lse_i) + exp(s_ij - lse_j)``.
    """
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    rows = (row_pointer, row_count, row_stride)
    columns = (column_pointer, column_count, column_stride)
    rows_mk = _load(rows, first_row, 0, SIZE_D, BLOCK_M, CHUNK)
    lse_m = tl.load(row_lse + row, mask=row < row_count, other=0.0) * LOG2_E
    if not ONLINE:
        factor_m = tl.exp2(scale - lse_m)
    first_d = tl.program_id(2) * CHUNK
    gradient_mk = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    begin = split * share
    end = tl.minimum(begin + share, column_count)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        logits_mn, columns_nk = _products(
            rows_mk, rows, first_row, columns, first, SIZE_D, CHUNK, BLOCK_M, BLOCK_N, PRECISION
        )
        logits_mn *= scale
        if OWN:
            lse_n = tl.load(column_lse + column, mask=column < column_count, other=0.0) * LOG2_E
        if ONLINE:
            weight_mn = tl.exp2(logits_mn - lse_m[:, None])
            if OWN:
                weight_mn += tl.exp2(logits_mn - lse_n[None, :])
        else:
            weight_mn = tl.exp2(logits_mn - scale)
            if OWN:
                weight_mn = weight_mn * (factor_m[:, None] + tl.exp2(scale - lse_n)[None, :])
            else:
                weight_mn = weight_mn * factor_m[:, None]
        pair = (column < column_count)[None, :]
        if OWN:
            pair = pair & (row[:, None] + own_start != column[None, :])
        weight_mn = tl.where(pair, weight_mn, 0.0)
        if CHUNK < SIZE_D:
            columns_nk = _load(columns, first, first_d, SIZE_D, BLOCK_N, CHUNK)
        gradient_mk = tl.dot(
            weight_mn.to(columns_nk.dtype), columns_nk, gradient_mk, input_precision=PRECISION
        )
    d = first_d + tl.arange(0, CHUNK)
    base = gradient + (tl.cast(split, tl.int64) * row_count + first_row) * SIZE_D
    offset = tl.arange(0, BLOCK_M)[:, None] * SIZE_D + d[None, :]
    tl.store(base + offset, gradient_mk, mask=(row < row_count)[:, None] & (d < SIZE_D)[None, :])
