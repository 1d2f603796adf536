"""The contrastive loss over all processes with three kinds of communication; part of scaling.py.

Every loss is NT-Xent of the global batch, and leaves the same gradient by this process's rows: W
times that of the global mean. They differ in what they send. Of M rows of D numbers on each of W
processes, in rings:

- ours: one all-gather of rows, one of three numbers per row; nothing in backward;
- reduce-scatter: an all-gather of rows; in backward a reduce-scatter of the gradients of all rows;
- all-reduce: the same, but with an all-reduce, of which each process keeps its own part. That is
  what lightly's and solo-learn's GatherLayer does.

Here one all-to-all and a sum stand for the reduce-scatter: they send exactly what a ring's sends,
in one call, whatever gloo's own does.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from common.collectives import Gathering, start_gather
from kernels.ntxent import nt_xent, ops

TEMPERATURE = 0.1
STATISTICS = 3  # numbers per row in our second gather: log-sum-exp, positive, nearest or not
FLOAT = 4

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss over all processes."""

    name: str
    loss: Loss
    """From this process's projections ``(2, B, D)``."""
    exchange: Callable[[torch.Tensor], None]
    """Its collectives alone, without overlap, on rows ``(M, D)``."""
    bytes: Callable[[int, int, int], float]
    """Sent by a process in a step, by rows of a process, dimensions and processes."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def ours(z_VBD: torch.Tensor) -> torch.Tensor:
    return nt_xent(z_VBD, TEMPERATURE)[0]


def gathered_first() -> AbstractContextManager[Any]:
    """Our loss, but its own block waits for all rows: what overlap would have hidden."""

    def start_and_wait(*arguments: Any) -> Gathering:
        return Gathering(None, start_gather(*arguments).wait())

    return mock.patch.object(ops, "start_gather", start_and_wait)


class _ReduceScattered(torch.autograd.Function):
    """All rows in rank order; backward sums the gradients of the own rows over all processes."""

    @staticmethod
    def forward(ctx: Any, local_MD: torch.Tensor) -> torch.Tensor:
        return gather(local_MD)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> torch.Tensor:
        return reduce_scatter(grad_ND)


class _AllReduced(torch.autograd.Function):
    """The same with an all-reduce."""

    @staticmethod
    def forward(ctx: Any, local_MD: torch.Tensor) -> torch.Tensor:
        return gather(local_MD)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> torch.Tensor:
        grad_ND = grad_ND.contiguous()
        dist.all_reduce(grad_ND)
        return grad_ND.chunk(dist.get_world_size())[dist.get_rank()]


def gather(local_MD: torch.Tensor) -> torch.Tensor:
    all_ND = local_MD.new_empty((dist.get_world_size() * local_MD.shape[0], local_MD.shape[1]))
    dist.all_gather_single(all_ND, local_MD.contiguous())
    return all_ND


def reduce_scatter(grad_ND: torch.Tensor) -> torch.Tensor:
    parts_ND = torch.empty_like(grad_ND)
    dist.all_to_all_single(parts_ND, grad_ND.contiguous())
    return parts_ND.view(dist.get_world_size(), -1, grad_ND.shape[1]).sum(0)


def usual(gathering: type[torch.autograd.Function]) -> Loss:
    """What one writes: gather with gradient, own rows against all, cross-entropy."""

    def loss(z_VBD: torch.Tensor) -> torch.Tensor:
        unit_MD = nn.functional.normalize(z_VBD.flatten(0, 1), dim=1)
        all_ND = gathering.apply(unit_MD)
        rows = len(unit_MD)
        own_M = torch.arange(rows) + dist.get_rank() * rows
        logits_MN = unit_MD @ all_ND.T / TEMPERATURE
        logits_MN[torch.arange(rows), own_M] = float("-inf")
        return nn.functional.cross_entropy(logits_MN, own_M.roll(rows // 2))

    return loss


def _lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE, gather_distributed=True)
    return lambda z_VBD: loss(z_VBD[0], z_VBD[1])


def _exchange_ours(unit_MD: torch.Tensor) -> None:
    gather(unit_MD)
    gather(unit_MD[:, :STATISTICS])


def _exchange_reduce_scatter(unit_MD: torch.Tensor) -> None:
    reduce_scatter(gather(unit_MD))


def _exchange_all_reduce(unit_MD: torch.Tensor) -> None:
    dist.all_reduce(gather(unit_MD))


def _bytes_ours(rows: int, dim: int, world: int) -> float:
    return FLOAT * rows * (dim + STATISTICS) * (world - 1)


def _bytes_reduce_scatter(rows: int, dim: int, world: int) -> float:
    return FLOAT * rows * dim * (world - 1) * 2


def _bytes_all_reduce(rows: int, dim: int, world: int) -> float:
    return FLOAT * rows * dim * (world - 1) * 3


def contenders(peers: bool = True) -> dict[str, Contender]:
    """All of them by name, ours first; with ``peers`` lightly's too, where it is installed."""
    all_reduce = (_exchange_all_reduce, _bytes_all_reduce)
    found = [
        Contender("widebatch", ours, _exchange_ours, _bytes_ours),
        Contender("widebatch, waiting", ours, _exchange_ours, _bytes_ours, gathered_first),
        Contender(
            "gather, reduce-scatter",
            usual(_ReduceScattered),
            _exchange_reduce_scatter,
            _bytes_reduce_scatter,
        ),
        Contender("gather, all-reduce", usual(_AllReduced), *all_reduce),
    ]
    if peers and importlib.util.find_spec("lightly"):
        found.append(Contender("lightly", _lightly(), *all_reduce))
    return {each.name: each for each in found}


def gradient(contender: Contender, z_VBD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: the loss as this process has it, and the gradient by its projections."""
    leaf = z_VBD.detach().clone().requires_grad_()
    with contender.around():
        value = contender.loss(leaf)
        value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def check_equal(found: dict[str, Contender], size_d: int = 32) -> None:
    """All contenders compute one function and one gradient, or the comparison means nothing."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    z_VBD = torch.randn(2, 24, size_d, generator=generator)
    expected = None
    for contender in found.values():
        value, grad = gradient(contender, z_VBD)
        dist.all_reduce(value)  # theirs is the mean over the own anchors
        value /= dist.get_world_size()
        if expected is None:
            expected = value, grad
        assert torch.allclose(value, expected[0], rtol=1e-5), contender.name
        assert (grad - expected[1]).norm() <= 1e-4 * expected[1].norm(), contender.name
