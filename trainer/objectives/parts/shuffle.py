"""Shuffled BatchNorm's part that is not BatchNorm: rows permuted across processes, and back.

MoCo (He et al. 2020, arXiv 1911.05722, section 3.3) gives the key encoder's BatchNorm other groups
of images than the query encoder's. The permutation comes from the counter generator, so that every
process knows it without being told and a resumed run draws the same; rows travel by one all-to-all,
N per process, where gathering and choosing would move W times as many.

Shapes: N rows of this process, W processes, B = W N rows in all.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from common.collectives import rank_and_size, waiting
from common.randomness import Stream, sample_keys
from kernels.dispatch import to_device

IntArray = npt.NDArray[np.int64]


def batch_permutation(seed: int, step: int, size: int) -> IntArray:
    """A permutation of ``range(size)``: a function of the run's seed and the step, on the host."""
    keys = sample_keys(seed, step, np.arange(size), 0, Stream.SHUFFLE)
    return np.argsort(keys, kind="stable").astype(np.int64)


def inverse(permutation: IntArray) -> IntArray:
    """The permutation that undoes this one."""
    return np.argsort(permutation, kind="stable").astype(np.int64)


@torch.no_grad()
def permute_rows(x: torch.Tensor, permutation: IntArray) -> torch.Tensor:
    """This process's share of ``all[permutation]``, all being the rows of all processes in order.

    A collective; no gradient; the host does not wait for the device.

    Args:
        x: ``(N, ...)``, as many rows on every process; channels_last stays so.
        permutation: of ``range(B)``, the same on all processes.

    Returns:
        The shape, dtype and memory format of ``x``: row j is row ``permutation[rank * N + j]``.

    Raises:
        ValueError: the permutation is not of B numbers.
    """
    rank, size = rank_and_size()
    rows = len(x)
    if len(permutation) != size * rows:
        raise ValueError(
            f"permute_rows: {len(permutation)} places for {rows} rows on each of {size} processes"
        )
    source_WN, row_WN = np.divmod(permutation.reshape(size, rows), max(rows, 1))
    # To each process what it wants of mine; from each what I want of its, both in the order of
    # the receiver's rows.
    sent_WN = source_WN == rank
    outgoing = _rows(x, row_WN[sent_WN])
    if size > 1:
        counts = np.bincount(source_WN[rank], minlength=size)
        arrived = _exchange(outgoing, list(map(int, sent_WN.sum(1))), list(map(int, counts)))
    else:
        arrived = outgoing
    place_N = inverse(np.argsort(source_WN[rank], kind="stable"))
    return _rows(arrived, place_N)


def _rows(x: torch.Tensor, index: IntArray) -> torch.Tensor:
    return x[to_device(index, x.device)].contiguous(memory_format=_memory_format(x))


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    is_image = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_image else torch.contiguous_format


def _exchange(x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """All-to-all of rows as bytes, which every backend moves, in the order of memory."""
    is_image = _memory_format(x) is torch.channels_last
    dense = x.permute(0, 2, 3, 1) if is_image else x
    outgoing = dense.view(len(x), -1).view(torch.uint8)
    arrived = outgoing.new_empty((sum(received), outgoing.shape[1]))
    with waiting("shuffled keys: all-to-all"):
        dist.all_to_all_single(arrived, outgoing, received, sent)
    result = arrived.view(dense.dtype).reshape(-1, *dense.shape[1:])
    return result.permute(0, 3, 1, 2) if is_image else result
