"""NT-Xent on several ranks: value and gradient of one process, whatever carries the batch.

Gradients are compared after DistributedDataParallel's averaging, for the parameters of a model: a
wrong gather gives the right loss, and LARS would hide a wrong scale (see the last tests).
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.collectives import DifferentiableGather, gather_rows
from kernels.ntxent import Implementation, nt_xent
from kernels.ntxent.reference import unit_rows
from tests.dist import run_ranks

TEMPERATURE = 0.1
TOLERANCE = 1e-6  # the promise; what is measured is about 1e-15

Loss = Callable[[torch.Tensor], torch.Tensor]


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)
    ).double()


def _images(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(batch, 10, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 10, generator=generator, dtype=torch.float64)
    return torch.stack([first, 0.8 * first + 0.6 * noise])


def _train_once(
    model: torch.nn.Module, x_VBK: torch.Tensor, loss_of: Loss
) -> dict[str, torch.Tensor]:
    """Loss, and the gradients of all parameters in one vector."""
    z_VBD = model(x_VBK.flatten(0, 1)).unflatten(0, (2, -1))
    loss = loss_of(z_VBD)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"loss": loss.detach(), "gradient": torch.cat([g.flatten() for g in gradients])}


def _one_process(batch: int) -> dict[str, torch.Tensor]:
    return _train_once(
        _model(), _images(batch), lambda z: nt_xent(z, TEMPERATURE, implementation="reference")[0]
    )


def _share(rank: int, rows: list[int]) -> torch.Tensor:
    start = sum(rows[:rank])
    return _images(sum(rows))[:, start : start + rows[rank]]


def _train_on_ranks(
    rank: int, world_size: int, implementation: Implementation
) -> dict[str, torch.Tensor]:
    return _train_once(
        DistributedDataParallel(_model()),
        _share(rank, [12 // world_size] * world_size),
        lambda z: nt_xent(z, TEMPERATURE, implementation=implementation, block_size=5)[0],
    )


def _assert_same(results: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for result in results:
        assert (result["loss"] - expected["loss"]).abs() < TOLERANCE
        assert (result["gradient"] - expected["gradient"]).abs().max() < TOLERANCE
        assert torch.equal(result["loss"], results[0]["loss"]), "ranks must agree to the last bit"


@pytest.mark.reliability(13)
@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_ranks_trains_as_one_process(
    world_size: int, implementation: Implementation
) -> None:
    results = run_ranks(_train_on_ranks, world_size, implementation)
    _assert_same(results, _one_process(12))


# --- the bugs of the field, made on purpose: the comparison above must see them -------------------


def _wrong_gather(kind: str) -> Loss:
    """Losses of the right value whose gradient is wrong."""

    def loss(z_VBD: torch.Tensor) -> torch.Tensor:
        unit_MD = unit_rows(z_VBD).flatten(0, 1)
        rank, rows = dist.get_rank(), len(unit_MD)
        others = gather_rows(unit_MD).split(rows)
        if kind == "own slice only":  # gradient for the own rows in the gathered batch, no more
            all_ND = torch.cat([unit_MD if r == rank else o for r, o in enumerate(others)])
        elif kind == "detached":
            all_ND = torch.cat(others)
        else:
            all_ND = DifferentiableGather.apply(unit_MD)
        start = rank * rows
        logits = unit_MD @ all_ND.T / TEMPERATURE
        logits[torch.arange(rows), torch.arange(start, start + rows)] = -math.inf
        positive = torch.arange(start, start + rows).roll(rows // 2)
        local = torch.nn.functional.cross_entropy(logits, positive)
        if kind == "not scaled by W":
            local = local / dist.get_world_size()
        value = local.detach().clone()
        dist.all_reduce(value)
        value /= 1 if kind == "not scaled by W" else dist.get_world_size()
        return local + (value - local).detach()  # the global value, this local gradient

    return loss


def _train_wrongly(
    rank: int, world_size: int, rows: list[int], kind: str
) -> dict[str, torch.Tensor]:
    return _train_once(DistributedDataParallel(_model()), _share(rank, rows), _wrong_gather(kind))


@pytest.mark.parametrize("kind", ["own slice only", "detached", "not scaled by W"])
def test_a_wrong_gather_has_the_right_loss_and_is_caught_by_its_gradient(kind: str) -> None:
    results = run_ranks(_train_wrongly, 2, [6, 6], kind)
    expected = _one_process(12)
    for result in results:
        assert (result["loss"] - expected["loss"]).abs() < 1e-12
        error = (result["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
        assert error > 0.1
    with pytest.raises(AssertionError):
        _assert_same(results, expected)


def test_the_differentiable_gather_done_right_is_the_same_oracle() -> None:
    results = run_ranks(_train_wrongly, 2, [6, 6], "right after all")
    _assert_same(results, _one_process(12))


# --- masks, precision, communication ---------------------------------------------------


def _aligned_views(rank: int, world_size: int, implementation: Implementation) -> float:
    batch = 4
    axes = torch.eye(world_size * batch)[rank * batch : (rank + 1) * batch]
    z = torch.stack([axes, axes])  # positives equal, all else orthogonal
    return nt_xent(z, 0.05, implementation=implementation)[0].item()


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_positives_are_found_on_every_rank(implementation: Implementation) -> None:
    # With a mask that is off by a rank the loss would stick at ln(2B) or above.
    for loss in run_ranks(_aligned_views, 3, implementation):
        assert loss < 1e-6


def _accuracy_on_ranks(
    rank: int, world_size: int, rows: list[int], implementation: Implementation
) -> torch.Tensor:
    _, accuracy = nt_xent(_share(rank, rows), implementation=implementation, block_size=3)
    return accuracy


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_accuracy_is_that_of_all_ranks_samples(implementation: Implementation) -> None:
    rows = [5, 5, 5]
    whole = _images(sum(rows))
    _, expected = nt_xent(whole, implementation="reference")
    assert 0 < expected < 1
    results = run_ranks(_accuracy_on_ranks, 3, rows, implementation)
    assert [r.item() for r in results] == pytest.approx([expected.item()] * 3)


def _in_half(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = _share(rank, [6] * world_size).to(dtype).requires_grad_()
    loss, _ = nt_xent(x, 0.05)
    loss.backward()
    assert x.grad is not None
    return {"loss": loss.detach(), "gradient": x.grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_on_two_ranks(dtype: torch.dtype) -> None:
    results = run_ranks(_in_half, 2, dtype)
    x = _images(12).to(dtype).requires_grad_()
    loss, _ = nt_xent(x, 0.05)
    loss.backward()
    assert x.grad is not None
    gradient = torch.cat([r["gradient"] for r in results], dim=1)
    assert torch.allclose(results[0]["loss"], loss.detach(), rtol=1e-5)
    assert torch.allclose(gradient, 2 * x.grad, rtol=0.02, atol=1e-5)


def _backward_on_rank_0_only(rank: int, world_size: int) -> bool:
    x = _share(rank, [6] * world_size).requires_grad_()
    loss, _ = nt_xent(x, TEMPERATURE)
    if rank == 0:
        loss.backward()
    dist.barrier()  # rank 1 waits here until rank 0 has its gradient
    return x.grad is not None


def test_backward_communicates_nothing() -> None:
    assert run_ranks(_backward_on_rank_0_only, 2, timeout=15) == [True, False]
