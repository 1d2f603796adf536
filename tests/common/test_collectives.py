"""What ranks tell each other arrives equal on all of them, in time, and without pickle."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.collectives import AgreedFlags, all_gather_json, broadcast_json, gather_rows
from common.rendezvous import shutdown
from tests.dist import run_ranks

# --- rows ---------------------------------------------------------------------------------------


def _gather_uneven(rank: int, world_size: int, rows: list[int]) -> list[torch.Tensor]:
    first = sum(rows[:rank])
    ids = torch.arange(first, first + rows[rank])
    return [
        gather_rows(ids, rows),
        gather_rows(ids[:, None] * torch.tensor([1.0, 0.5]), rows),
        gather_rows(ids % 2 == 0, rows),
        gather_rows(ids.to(torch.bfloat16), rows),
    ]


@pytest.mark.parametrize("rows", [[2, 2], [3, 1, 2], [0, 2], [0, 0]])
def test_rows_arrive_in_rank_order_whatever_their_number(rows: list[int]) -> None:
    ids = torch.arange(sum(rows))
    for result in run_ranks(_gather_uneven, len(rows), rows):
        assert torch.equal(result[0], ids)
        assert torch.equal(result[1], ids[:, None] * torch.tensor([1.0, 0.5]))
        assert torch.equal(result[2], ids % 2 == 0)
        assert torch.equal(result[3], ids.to(torch.bfloat16))


def test_gathered_rows_carry_no_gradient() -> None:
    assert not gather_rows(torch.ones(2, 3, requires_grad=True)).requires_grad


def _gather_with_wrong_counts(rank: int, world_size: int) -> list[str]:
    messages = []
    for rows in ([1, 1], [2], [2, 2, 2]):
        try:
            gather_rows(torch.ones(2), rows)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_wrong_counts_are_refused_before_anything_is_sent() -> None:
    for messages in run_ranks(_gather_with_wrong_counts, 2):
        assert len(messages) == 3
        assert "rows_per_rank" in messages[0]


# --- flags --------------------------------------------------------------------------------------


def _post_and_read(rank: int, world_size: int, lag: int) -> list[dict[str, float]]:
    flags = AgreedFlags(("stop", "loss"), lag=lag)
    seen = [flags.read()]
    for step in range(5):
        # Rank 1 alone asks to stop at step 2; the largest loss is that of the last rank.
        flags.post(stop=rank == 1 and step == 2, loss=torch.tensor(float(10 * step + rank)))
        seen.append(flags.read())
    return seen


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_all_ranks_read_the_same_maxima_at_the_same_step(lag: int) -> None:
    posted = [{"stop": float(step == 2), "loss": 10.0 * step + 2} for step in range(5)]
    silence = {"stop": 0.0, "loss": 0.0}
    expected = [silence] * (1 + lag) + posted[: 5 - lag]
    for seen in run_ranks(_post_and_read, 3, lag):
        assert seen == expected


def test_the_cpu_reads_at_once_and_alone() -> None:
    flags = AgreedFlags(["stop"])
    flags.post(stop=True)
    assert flags.read() == {"stop": 1.0}
    flags.post(stop=False)
    assert flags.read() == {"stop": 0.0}


def _post_nan(rank: int, world_size: int) -> float:
    flags = AgreedFlags(["loss"])
    flags.post(loss=torch.tensor([math.nan if rank == 0 else 1.0]))
    return flags.read()["loss"]


def test_nan_on_one_rank_reaches_all_as_infinity() -> None:
    assert run_ranks(_post_nan, 2) == [math.inf, math.inf]


def test_flags_that_were_not_declared_or_are_missing_are_refused() -> None:
    flags = AgreedFlags(["stop", "loss"])
    for values in ({"stop": 1}, {"stop": 1, "loss": 0, "more": 2}):
        with pytest.raises(ValueError, match="declared"):
            flags.post(**values)


def test_counts_beyond_float32_are_exact() -> None:
    flags = AgreedFlags(["sample"])
    flags.post(sample=2**40 + 1)
    assert flags.read()["sample"] == 2**40 + 1


# --- JSON ---------------------------------------------------------------------------------------


def _broadcast(rank: int, world_size: int) -> list[Any]:
    config = {"out": "rüns/a", "n": [1, 2.5, None, True], "big": "x" * 100_000}
    return [
        broadcast_json(object() if rank else config) == config,
        broadcast_json(None if rank else ""),
        broadcast_json(None if rank else {}),
    ]


def test_an_object_reaches_every_rank() -> None:
    assert run_ranks(_broadcast, 2) == [[True, "", {}]] * 2


def _gather_lists(rank: int, world_size: int) -> list[Any]:
    return [all_gather_json([(rank, "ü")] * rank), all_gather_json(None)]


def test_values_of_different_lengths_arrive_in_rank_order() -> None:
    assert run_ranks(_gather_lists, 3) == [[[[], [[1, "ü"]], [[2, "ü"]] * 2], [None] * 3]] * 3


def _broadcast_an_object(rank: int, world_size: int) -> str:
    try:
        broadcast_json(object())
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def test_an_object_that_is_not_json_raises_on_all_ranks_and_hangs_none() -> None:
    for message in run_ranks(_broadcast_an_object, 3, timeout=20):
        assert "is not JSON" in message


def test_one_process_gets_what_all_would_get() -> None:
    assert broadcast_json({"a": (1, 2)}) == {"a": [1, 2]}
    with pytest.raises(TypeError):
        broadcast_json({1, 2})


# --- the end ------------------------------------------------------------------------------------


def _train_and_leave(rank: int, world_size: int) -> list[bool]:
    model = DistributedDataParallel(torch.nn.Linear(3, 2))
    held = [model]  # as a caller's frame does
    model(torch.ones(1, 3)).sum().backward()
    left = shutdown(torch.nn.ModuleList(held))
    return [left, dist.is_initialized(), shutdown()]


def test_leaving_ends_the_group_once_and_for_all() -> None:
    assert run_ranks(_train_and_leave, 2) == [[True, False, True]] * 2


def _fail_alone(rank: int, world_size: int, gone: Path) -> bool:
    if rank == 0:  # busy elsewhere until rank 1 has left
        while not gone.exists():
            time.sleep(0.01)
        return shutdown()
    try:
        raise ValueError("only here")
    except ValueError:
        left = shutdown()
    gone.touch()
    return left


def test_leaving_with_an_exception_does_not_wait_for_the_others(tmp_path: Path) -> None:
    # Rank 0 then meets nobody at the barrier: its own end must not take for ever either.
    assert run_ranks(_fail_alone, 2, tmp_path / "gone", timeout=30) == [True, True]


def test_leaving_without_a_group_does_nothing() -> None:
    assert shutdown() is True
