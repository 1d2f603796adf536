"""The proof, on the user's own processes: W of them compute what one would.

Loss, BatchNorm, LARS and queue one by one, in float64, on a few random numbers that every rank
knows all of. Each rank works on its share through the code that trains, and on everything through
plain torch; what differs is named. LARS stands for the gradients' averaging too.

Shapes: N samples of all ranks, D dimensions, C channels.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from common.collectives import gather_rows, rank_and_size
from kernels.ntxent import nt_xent
from trainer.doctor.finding import Finding, judged
from trainer.objectives.parts.key_queue import KeyQueue
from trainer.optim.lars import LARS
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm

_PER_RANK = 6
_BOUND = 1e-9  # float64 leaves 1e-13; a wrong scale or a missing rank leaves 0.1 and more


def equal_runs(device: torch.device) -> Iterator[Finding]:
    """One finding for each part. A collective."""
    size = rank_and_size()[1]
    parts: dict[str, Callable[[torch.device], float]] = {
        "loss": _loss,
        "batch norm": _batch_norm,
        "lars": _lars,
        "queue": _queue,
    }
    for name, part in parts.items():
        worst = torch.tensor([part(device)], dtype=torch.float64, device=device)
        if size > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        error = float(worst)
        yield judged(
            name,
            error < _BOUND,
            f"{size} process(es) against one: relative difference {error:.1e}",
            "bad",
            "do not train like this: another number of processes would be another run; compare "
            "torch and NCCL on all nodes, and report it with this table",
        )


def _random(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def _mine(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    rank, size = rank_and_size()
    return rows.chunk(size, dim)[rank].clone()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _averaged(gradient: torch.Tensor) -> torch.Tensor:
    """As DistributedDataParallel does."""
    size = rank_and_size()[1]
    if size > 1:
        dist.all_reduce(gradient)
    return gradient / size


def _plain_loss(z_VND: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's equation 1 for all samples at once."""
    unit = nn.functional.normalize(z_VND.flatten(0, 1), dim=1)
    logits = unit @ unit.T / temperature
    logits = logits.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -1e9)
    positive = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return nn.functional.cross_entropy(logits, positive)


def _loss(device: torch.device) -> float:
    """Value, and the gradient of a weight that makes the projections, averaged as DDP does."""
    size = rank_and_size()[1]
    inputs = _random(2, size * _PER_RANK, 8, device=device)
    weight = _random(8, 16, device=device, seed=1).requires_grad_()
    whole = _plain_loss(inputs @ weight, 0.1)
    (wanted,) = torch.autograd.grad(whole, weight)
    ours = nt_xent(_mine(inputs, dim=1) @ weight, 0.1, implementation="blocked")[0]
    (got,) = torch.autograd.grad(ours, weight)
    return max(_difference(ours.detach(), whole.detach()), _difference(_averaged(got), wanted))


def _batch_norm(device: torch.device) -> float:
    """Output, gradient by the input, running variance."""
    if device.type == "cuda" and rank_and_size()[1] == 1:
        return 0.0  # torch's own layer serves there: nothing is compared
    size = rank_and_size()[1]
    x_NC = 3 + _random(size * _PER_RANK, 5, device=device)
    weight_NC = _random(size * _PER_RANK, 5, device=device, seed=1)
    results = []
    for layer, x, weight in (
        (nn.BatchNorm1d(5), x_NC, weight_NC),
        (convert_sync_batch_norm(nn.BatchNorm1d(5)), _mine(x_NC), _mine(weight_NC)),
    ):
        layer = layer.to(device, torch.float64).train()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weight).sum().backward()
        assert leaf.grad is not None  # noqa: S101 - for the type checker
        running = layer.running_var
        assert isinstance(running, torch.Tensor)  # noqa: S101
        results.append((y.detach(), leaf.grad, running))
    (y, dx, running), (our_y, our_dx, our_running) = results
    return max(
        _difference(our_y, _mine(y)),
        _difference(our_dx, _mine(dx)),
        _difference(our_running, running),
    )


def _lars(device: torch.device) -> float:
    """Two steps on a linear regression: trust ratios need the norm of the averaged gradient."""
    size = rank_and_size()[1]
    x, y = _random(size * _PER_RANK, 4, device=device), _random(size * _PER_RANK, 3, device=device)
    ours, plain = (_random(4, 3, device=device, seed=2).requires_grad_() for _ in range(2))
    optimizer = LARS([ours], lr=0.1, momentum=0.9, weight_decay=1e-4)
    velocity = torch.zeros_like(plain)
    for _ in range(2):
        (gradient,) = torch.autograd.grad((_mine(x) @ ours - _mine(y)).square().mean(), ours)
        ours.grad = _averaged(gradient)
        optimizer.step()
        (gradient,) = torch.autograd.grad((x @ plain - y).square().mean(), plain)
        with torch.no_grad():
            update = gradient + 1e-4 * plain
            velocity = 0.9 * velocity + 0.1 * 1e-3 * plain.norm() / update.norm() * update
            plain -= velocity
    return _difference(ours.detach(), plain.detach())


def _queue(device: torch.device) -> float:
    """The queue of keys after two batches that do not divide it."""
    size = rank_and_size()[1]
    torch.manual_seed(0)
    queue = KeyQueue(size * _PER_RANK + 1, 4).to(device, torch.float64)
    expected = queue.rows.clone()
    place = 0
    for seed in range(2):
        keys = nn.functional.normalize(_random(size * _PER_RANK, 4, device=device, seed=seed))
        queue.push(gather_rows(_mine(keys)), torch.zeros((), device=device))
        for key in keys:
            expected[place] = key
            place = (place + 1) % len(expected)
    return _difference(queue.rows, expected)
