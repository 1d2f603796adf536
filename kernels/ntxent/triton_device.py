"""The Triton kernels of :mod:`kernels.ntxent.triton_kernels`, which says what they share and why.

Counts are not specialised on: Triton would compile a kernel anew, with other registers, for a count
of 1 or a multiple of 16, and ``kernels.inspect`` would not have seen it. Strides and dimensions are
multiples of 16 always.

Shapes: M rows against N columns, D dimensions, m x n a tile, k a chunk of the dimensions.
"""

# mypy: disable-error-code="no-untyped-def"
# Types of a kernel's arguments are Triton's, not Python's.

import triton
import triton.language as tl

__all__ = ["cross_kernel", "gradient_kernel", "own_block_kernel"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(
    pointer,
    first,
    count,
    stride,
    first_d,
    SIZE_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows and dimensions from ``first, first_d`` as ``(BLOCK, BLOCK_D)``, zeros beyond them."""
    row = tl.arange(0, BLOCK)
    d = first_d + tl.arange(0, BLOCK_D)
    inside = (row < count - first)[:, None]
    if SIZE_D % BLOCK_D != 0:
        inside = inside & (d < SIZE_D)[None, :]
    # 64 bits for where the tile begins: N * D may pass 2^31, offsets within a tile do not.
    base = pointer + tl.cast(first, tl.int64) * stride
    tile = tl.load(base + row[:, None] * stride + d[None, :], mask=inside, other=0.0)
    if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _chunked_products(
    rows,
    first_row,
    row_count,
    row_stride,
    columns,
    first_column,
    column_count,
    column_stride,
    SIZE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``u_i . v_j`` of a tile, ``CHUNK`` dimensions at a time: float32 rows fill the registers."""
    products_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_d in range(0, SIZE_D, CHUNK):
        rows_mk = _load_tile(
            rows, first_row, row_count, row_stride, first_d, SIZE_D, BLOCK_M, CHUNK, UPCAST
        )
        columns_nk = _load_tile(
            columns,
            first_column,
            column_count,
            column_stride,
            first_d,
            SIZE_D,
            BLOCK_N,
            CHUNK,
            UPCAST,
        )
        products_mn = tl.dot(rows_mk, tl.trans(columns_nk), products_mn, input_precision=PRECISION)
    return products_mn


@triton.jit
def _accumulate(total, maximum, logits_mn, largest, AXIS: tl.constexpr, ONLINE: tl.constexpr):
    """Add a tile's ``exp2(logits)`` along ``AXIS`` to running sums, relative to their maximum.

    Returns sums and maxima; with ``ONLINE`` off they are relative to ``largest``, which no logit
    exceeds, and the maxima are not kept.
    """
    if ONLINE:
        larger = tl.maximum(maximum, tl.max(logits_mn, AXIS))
        # No logit yet: any finite reference gives the sum 0, where -inf - -inf would be NaN.
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        weights_mn = tl.exp2(logits_mn - tl.expand_dims(reference, AXIS))
        total = total * tl.exp2(maximum - reference) + tl.sum(weights_mn, AXIS)
        maximum = larger
    else:
        total += tl.sum(tl.exp2(logits_mn - largest), AXIS)
    return total, maximum


@triton.jit
def _add_to_slot(
    sums,
    maxima,
    rivals,
    index,
    inside,
    total,
    maximum,
    rival,
    ONLINE: tl.constexpr,
    RIVAL: tl.constexpr,
):
    """Merge statistics into those in memory. Only this program touches these addresses."""
    before = tl.load(sums + index, mask=inside, other=0.0)
    if ONLINE:
        maximum_before = tl.load(maxima + index, mask=inside, other=float("-inf"))
        larger = tl.maximum(maximum, maximum_before)
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(maximum - reference)
        before = before * tl.exp2(maximum_before - reference)
        tl.store(maxima + index, larger, mask=inside)
    tl.store(sums + index, before + total, mask=inside)
    if RIVAL:
        rival_before = tl.load(rivals + index, mask=inside, other=float("-inf"))
        tl.store(rivals + index, tl.maximum(rival, rival_before), mask=inside)


@triton.jit(do_not_specialize=["count", "blocks_per_group"])
def own_block_kernel(
    unit,
    positive,
    sums,
    maxima,
    rivals,
    count,
    stride,
    scale,
    blocks_per_group,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ONLINE: tl.constexpr,
    RIVAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums of ``exp2(scale u_i . u_j)``, j != i, of all rows, from the upper triangle of tiles."""
    upper = tl.program_id(0)
    right = tl.program_id(1)
    if upper > right:
        return
    blocks = tl.cdiv(count, BLOCK)
    last_row_block = tl.minimum((upper + 1) * blocks_per_group, blocks)
    last_column_block = tl.minimum((right + 1) * blocks_per_group, blocks)
    slot_of_rows = tl.cast(right, tl.int64) * count
    slot_of_columns = tl.cast(upper, tl.int64) * count
    for row_block in range(upper * blocks_per_group, last_row_block):
        row = row_block * BLOCK + tl.arange(0, BLOCK)
        first_row = row_block * BLOCK
        if CHUNK >= SIZE_D:
            rows_mD = _load_tile(unit, first_row, count, stride, 0, SIZE_D, BLOCK, CHUNK, UPCAST)
        total = tl.zeros((BLOCK,), tl.float32)
        maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
        rival = tl.full((BLOCK,), float("-inf"), tl.float32)
        if RIVAL:
            positive_m = tl.load(positive + row, mask=row < count, other=-1)
        for column_block in range(
            tl.maximum(row_block, right * blocks_per_group), last_column_block
        ):
            first = column_block * BLOCK
            column = first + tl.arange(0, BLOCK)
            if CHUNK >= SIZE_D:
                columns_nD = _load_tile(unit, first, count, stride, 0, SIZE_D, BLOCK, CHUNK, UPCAST)
                logits_mn = tl.dot(rows_mD, tl.trans(columns_nD), input_precision=PRECISION)
            else:
                logits_mn = _chunked_products(
                    unit,
                    first_row,
                    count,
                    stride,
                    unit,
                    first,
                    count,
                    stride,
                    SIZE_D,
                    BLOCK,
                    BLOCK,
                    CHUNK,
                    PRECISION,
                    UPCAST,
                )
            logits_mn *= scale
            pair = (row < count)[:, None] & (column < count)[None, :]
            pair = pair & (row[:, None] != column[None, :])
            logits_mn = tl.where(pair, logits_mn, float("-inf"))
            # On the diagonal the tile is its own transpose: its rows are its columns.
            mirrored = (column < count) & (column_block != row_block)
            total, maximum = _accumulate(total, maximum, logits_mn, scale, 1, ONLINE)
            zero = tl.zeros((BLOCK,), tl.float32)
            nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
            total_n, maximum_n = _accumulate(zero, nothing, logits_mn, scale, 0, ONLINE)
            rival_n = nothing
            if RIVAL:
                others_mn = tl.where(
                    positive_m[:, None] == column[None, :], float("-inf"), logits_mn
                )
                rival = tl.maximum(rival, tl.max(others_mn, 1))
                rival_n = tl.max(others_mn, 0)
            _add_to_slot(
                sums,
                maxima,
                rivals,
                slot_of_columns + column,
                mirrored,
                total_n,
                maximum_n,
                rival_n,
                ONLINE,
                RIVAL,
            )
        # Within a group these rows were columns before: other threads may have written their slot.
        tl.debug_barrier()
        _add_to_slot(
            sums,
            maxima,
            rivals,
            slot_of_rows + row,
            row < count,
            total,
            maximum,
            rival,
            ONLINE,
            RIVAL,
        )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["row_count", "column_count"])
def cross_kernel(
    rows,
    columns,
    positive,
    sums,
    maxima,
    rivals,
    row_count,
    column_count,
    row_stride,
    column_stride,
    scale,
    columns_per_split,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONLINE: tl.constexpr,
    RIVAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums of ``exp2(scale u_i . v_j)`` of a block of rows over one split of the columns."""
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    if CHUNK >= SIZE_D:
        rows_mD = _load_tile(
            rows, first_row, row_count, row_stride, 0, SIZE_D, BLOCK_M, CHUNK, UPCAST
        )
    total = tl.zeros((BLOCK_M,), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    rival = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if RIVAL:
        positive_m = tl.load(positive + row, mask=row < row_count, other=-1)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, column_count)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        if CHUNK >= SIZE_D:
            columns_nD = _load_tile(
                columns, first, column_count, column_stride, 0, SIZE_D, BLOCK_N, CHUNK, UPCAST
            )
            logits_mn = tl.dot(rows_mD, tl.trans(columns_nD), input_precision=PRECISION)
        else:
            logits_mn = _chunked_products(
                rows,
                first_row,
                row_count,
                row_stride,
                columns,
                first,
                column_count,
                column_stride,
                SIZE_D,
                BLOCK_M,
                BLOCK_N,
                CHUNK,
                PRECISION,
                UPCAST,
            )
        logits_mn *= scale
        logits_mn = tl.where((column < column_count)[None, :], logits_mn, float("-inf"))
        total, maximum = _accumulate(total, maximum, logits_mn, scale, 1, ONLINE)
        if RIVAL:
            others_mn = tl.where(positive_m[:, None] == column[None, :], float("-inf"), logits_mn)
            rival = tl.maximum(rival, tl.max(others_mn, 1))
    index = tl.cast(split, tl.int64) * row_count + row
    tl.store(sums + index, total, mask=row < row_count)
    if ONLINE:
        tl.store(maxima + index, maximum, mask=row < row_count)
    if RIVAL:
        tl.store(rivals + index, rival, mask=row < row_count)


@triton.jit(do_not_specialize=["row_count", "column_count", "own_start"])
def gradient_kernel(
    rows,
    columns,
    row_lse,
    column_lse,
    gradient,
    row_count,
    column_count,
    row_stride,
    column_stride,
    own_start,
    scale,
    columns_per_split,
    SIZE_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    ONLINE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``sum_j w_ij v_j`` of a block of rows over one split of the columns, ``CHUNK`` dimensions.

    ``w_ij = exp(s_ij - lse_i)``, plus ``exp(s_ij - lse_j)`` where ``TWO_SIDED``. With
    ``EXCLUDE_SELF`` row i is column ``own_start + i``, and is left out.
    """
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    if CHUNK >= SIZE_D:
        rows_mD = _load_tile(
            rows, first_row, row_count, row_stride, 0, SIZE_D, BLOCK_M, CHUNK, UPCAST
        )
    lse_m = tl.load(row_lse + row, mask=row < row_count, other=0.0) * LOG2_E
    if not ONLINE:
        factor_m = tl.exp2(scale - lse_m)
    first_d = tl.program_id(2) * CHUNK
    gradient_mk = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, column_count)
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        if CHUNK >= SIZE_D:
            columns_nD = _load_tile(
                columns, first, column_count, column_stride, 0, SIZE_D, BLOCK_N, CHUNK, UPCAST
            )
            logits_mn = tl.dot(rows_mD, tl.trans(columns_nD), input_precision=PRECISION)
        else:
            logits_mn = _chunked_products(
                rows,
                first_row,
                row_count,
                row_stride,
                columns,
                first,
                column_count,
                column_stride,
                SIZE_D,
                BLOCK_M,
                BLOCK_N,
                CHUNK,
                PRECISION,
                UPCAST,
            )
        logits_mn *= scale
        if TWO_SIDED:
            lse_n = tl.load(column_lse + column, mask=column < column_count, other=0.0) * LOG2_E
        if ONLINE:
            weight_mn = tl.exp2(logits_mn - lse_m[:, None])
            if TWO_SIDED:
                weight_mn += tl.exp2(logits_mn - lse_n[None, :])
        else:
            weight_mn = tl.exp2(logits_mn - scale)
            if TWO_SIDED:
                weight_mn = weight_mn * (factor_m[:, None] + tl.exp2(scale - lse_n)[None, :])
            else:
                weight_mn = weight_mn * factor_m[:, None]
        pair = (column < column_count)[None, :]
        if EXCLUDE_SELF:
            pair = pair & (row[:, None] + own_start != column[None, :])
        weight_mn = tl.where(pair, weight_mn, 0.0)
        if CHUNK >= SIZE_D:
            columns_nk = columns_nD
        else:
            columns_nk = _load_tile(
                columns, first, column_count, column_stride, first_d, SIZE_D, BLOCK_N, CHUNK, UPCAST
            )
        gradient_mk = tl.dot(
            weight_mn.to(columns_nk.dtype), columns_nk, gradient_mk, input_precision=PRECISION
        )
    d = first_d + tl.arange(0, CHUNK)
    base = gradient + (tl.cast(split, tl.int64) * row_count + first_row) * SIZE_D
    offset = tl.arange(0, BLOCK_M)[:, None] * SIZE_D + d[None, :]
    tl.store(base + offset, gradient_mk, mask=(row < row_count)[:, None] & (d < SIZE_D)[None, :])
