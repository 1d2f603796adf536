"""Tensors of which every process holds a piece, and their norms.

Shapes: P pieces on this process, K lists of them, L layers.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common.collectives import waiting

Tensors = list[torch.Tensor]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's piece of one of FSDP's, in the same memory; a plain tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every process. A collective, unless it is plain."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norms(tensors: Tensors) -> torch.Tensor:
    """Euclidean norms of these pieces, one each, in at least float32; no communication."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def total_norm(pieces: Tensors, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Euclidean norm of everything together: 0-d, not synchronised. A collective over ``group``.

    Args:
        pieces: this process's; with a group there may be none.
        group: the processes that hold the other pieces; None where there are none.
    """
    norm = torch.nn.utils.get_total_norm(pieces, foreach=True)
    if group is None:
        return norm
    square = norm.double().square()  # of large norms, a float32 has no square
    with waiting("gradient norm: all-reduce"):
        dist.all_reduce(square, group=group)
    return square.sqrt().to(norm.dtype)


class LayerNorms:
    """Norms of whole layers of which this process holds pieces: one all-reduce for all of them.

    Args:
        group: the processes that hold the pieces.
        count: layers, the same on all processes.
        held: layers that this process holds a piece of, in the order of the pieces; by default all.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, count: int, held: torch.Tensor | None = None
    ) -> None:
        self._group, self._count, self._held = group, count, held

    def __call__(self, *lists: Tensors) -> tuple[torch.Tensor, ...]:
        """Norms of lists of pieces, ``(P,)`` each: those of their layers. A collective."""
        if self._group is None:
            return tuple(map(norms, lists))
        # Squares are added in float64 in an order that the layout fixes: no atomics, the same bits
        # in every run.
        held = slice(None) if self._held is None else self._held
        device = lists[0][0].device if self._held is None else self._held.device
        squares_KL = torch.zeros(len(lists), self._count, dtype=torch.float64, device=device)
        mine_KP = torch.stack(list(map(norms, lists))) if lists[0] else squares_KL[:, :0]
        squares_KL[:, held] = mine_KP.double().square()
        with waiting("norms of layers: all-reduce"):
            dist.all_reduce(squares_KL, group=self._group)
        return squares_KL.sqrt()[:, held].to(mine_KP.dtype).unbind()
