"""The nearest rows by cosine similarity: exact, in blocks, with a running list of the best ``k``.

Every pair is compared; the similarity matrix is never held. Rows of equal similarity come in their
order, so the result is a pure function of the features.

Shape suffixes: N rows that are searched, M rows that ask, F features, K neighbours, B rows of a
block that asks, T rows of a block that is searched.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_LOW_WORD = 0xFFFFFFFF  # also the largest number of rows that can be searched


@torch.no_grad()
def nearest_rows(
    bank_NF: torch.Tensor,
    asked_MF: torch.Tensor,
    k: int,
    *,
    device: torch.device | str,
    block: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``min(k, N)`` nearest rows of ``bank_NF`` of every row of ``asked_MF``, nearest first.

    Features have any float dtype, on any device; they are compared in float32 on ``device``, a
    ``block`` of rows that ask and of rows that are searched at once.

    Returns:
        Similarities float32 (M, K) and indices int64 (M, K) on the CPU.
    """
    device = torch.device(device)
    rows, columns = block or ((128, 4096) if device.type == "cpu" else (1024, 32_768))
    k = min(k, len(bank_NF))
    with full_float32(device):
        asked = unit_rows(asked_MF, device).split(rows)
        best = [torch.empty(len(x_BF), 0, dtype=torch.int64, device=device) for x_BF in asked]
        for first in range(0, len(bank_NF), columns):  # outermost: crosses to the device once
            bank_TF = unit_rows(bank_NF[first : first + columns], device)
            for i, x_BF in enumerate(asked):
                keys_BT = sortable(x_BF @ bank_TF.T, first)
                keys_BT = keys_BT.topk(min(k, keys_BT.shape[1])).values
                merged = torch.cat([best[i], keys_BT], dim=1)
                best[i] = merged.topk(min(k, merged.shape[1])).values
    return read_keys(torch.cat(best).cpu())


def nearest_others(
    bank_NF: torch.Tensor, itself_M: torch.Tensor, k: int, *, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`nearest_rows` of the rows ``itself_M`` of the bank, which do not find themselves.

    Returns:
        Similarities and indices (M, K) of the ``min(k, N - 1)`` nearest others.
    """
    similarity_MK, index_MK = nearest_rows(bank_NF, bank_NF[itself_M], k + 1, device=device)
    # Of many equal rows, a list may not hold its own: then it loses its last instead.
    itself_MK = index_MK == itself_M[:, None]
    order_MK = itself_MK.int().argsort(dim=1, stable=True)[:, : index_MK.shape[1] - 1]
    return similarity_MK.gather(1, order_MK), index_MK.gather(1, order_MK)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products in true float32: neither an autocast nor TF32 that training left switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def unit_rows(x_NF: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of length 1, float32 on ``device``; a row of zeros stays one."""
    return nn.functional.normalize(x_NF.to(device, torch.float32), dim=1)


def sortable(similarity_BT: torch.Tensor, first: int) -> torch.Tensor:
    """One int64 per pair that sorts by similarity, then by the lower training index.

    The high word is the float's bits, made to sort as integers; the low word counts down. Keys are
    unique, so even a top-k that breaks ties as it likes has one answer.
    """
    bits = (similarity_BT + 0.0).view(torch.int32)  # + 0.0: -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index_T = torch.arange(first, first + bits.shape[1], device=bits.device)
    return (ordered.long() << 32) | (_LOW_WORD - index_T)


def read_keys(keys_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities (float32) and training indices (int64) of keys."""
    ordered = (keys_BK >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_WORD - (keys_BK & _LOW_WORD)
