"""The Triton LARS and EMA without a GPU: interpreted, and how tensors are cut into chunks."""

import math

import pytest
import torch
from torch import nn

from kernels import dispatch, multi_tensor
from kernels.ema import ema_update_
from kernels.multi_tensor import obstacle
from tests.kernels.interpreter import run_interpreted
from trainer.optim.lars import LARS


def test_updates_and_averages_in_the_interpreter() -> None:
    run_interpreted("lars")


@pytest.mark.slow
@pytest.mark.timeout(1600)  # the interpreter takes minutes
def test_many_steps_in_the_interpreter() -> None:
    run_interpreted("lars", slow=True)


def test_chunks_cover_every_element_once() -> None:
    sizes = (0, 1, multi_tensor.CHUNK, multi_tensor.CHUNK + 1, 3 * multi_tensor.CHUNK - 1, 0)
    cut = multi_tensor.chunks(sizes, torch.device("cpu"))
    covered = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for tensor, place, count in cut.plan.T.tolist():
        begin = place * multi_tensor.CHUNK
        covered[tensor][begin : begin + count] += 1
    assert all((c == 1).all() for c in covered)
    assert cut.first.tolist() == [0, 0, 1, 2, 4, 7, 7]
    assert cut.count == 7


def test_tables_are_made_again_only_when_something_has_moved() -> None:
    one, other = torch.ones(3), torch.ones(3)
    device = torch.device("cpu")
    where = multi_tensor.addresses([[one], [other]])
    table = multi_tensor.address_table(where, device)
    assert table.tolist() == [[one.data_ptr()], [other.data_ptr()]]
    again = multi_tensor.addresses([[one], [other]])
    assert multi_tensor.address_table(again, device) is table
    moved = multi_tensor.addresses([[one], [other.clone()]])
    assert multi_tensor.address_table(moved, device) is not table
    assert multi_tensor.all_aligned(where)
    assert not multi_tensor.all_aligned(multi_tensor.addresses([[one[1:]]]))


def test_on_a_cpu_foreach_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    LARS([parameter], lr=0.1).step()
    ema_update_([torch.ones(2)], [torch.zeros(2)], 0.5)
    told = dispatch.explain()
    dispatch.forget()
    assert "lars: foreach: Triton does not run on cpu" in told
    assert "ema: foreach: Triton does not run on cpu" in told
    assert "(fallback)" not in told  # nothing is faster here


def test_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="Triton does not run on cpu; use 'auto'"):
        LARS([parameter], lr=0.1, implementation="triton").step()
    with pytest.raises(ValueError, match="does not run on cpu"):
        ema_update_([torch.ones(2)], [torch.ones(2)], 0.5, "triton")
    with pytest.raises(ValueError, match="unknown implementation 'magic'"):
        LARS([parameter], lr=0.1, implementation="magic")  # type: ignore[arg-type]


def test_what_keeps_the_kernel_from_a_tensor_is_named() -> None:
    plain = torch.ones(2, 2)
    assert "bfloat16, not float32" in obstacle(plain.bfloat16(), plain)
    assert "gradients are float64" in obstacle(plain, plain.double())
    assert "sparse" in obstacle(plain, plain.to_sparse())
    assert "does not run on meta" in obstacle(plain.to("meta"), plain.to("meta"))


def test_a_momentum_of_one_keeps_the_keys_whatever_the_queries_hold() -> None:
    key = torch.tensor([-0.0, 3.0])
    ema_update_([key], [torch.full((2,), math.nan)], 1.0)
    assert torch.equal(key, torch.tensor([0.0, 3.0]))
    assert key[0].signbit()


def test_moving_average_on_lists_of_tensors() -> None:
    keys = [torch.full((2,), 2.0), torch.full((3,), 4.0, dtype=torch.float64)]
    queries = [torch.zeros(2), torch.ones(3)]
    ema_update_(keys, queries, 0.75)
    assert torch.equal(keys[0], torch.full((2,), 1.5))
    assert torch.equal(keys[1], torch.full((3,), 3.25, dtype=torch.float64))
    ema_update_([], [], 0.5)


@pytest.mark.parametrize(
    ("keys", "queries", "momentum", "message"),
    [
        ([torch.ones(2)], [torch.ones(2)], 1.5, "must lie in"),
        ([torch.ones(2)], [], 0.5, "1 keys and 0 queries"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, "a query of"),
    ],
)
def test_wrong_averages_are_refused(
    keys: list[torch.Tensor], queries: list[torch.Tensor], momentum: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ema_update_(keys, queries, momentum)
