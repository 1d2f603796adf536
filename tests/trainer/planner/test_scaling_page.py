"""The page of costs says what the planner counts, and the planner counts what is sent.

The second half wraps torch's collectives on gloo: it counts the bytes that each loss hands to them,
by the rings' arithmetic, not what a wire carries. `benchmarks/scaling.py` reads the interfaces.
"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.dist import run_ranks
from tests.trainer.scaling_tables import bytes_tables, loss_table, point, strong_table, weak_table

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "scaling.md"
REMEDY = "docs/scaling.md: put in what `python -m tests.trainer.scaling_tables` prints"
ROWS, DIM = 48, 128


@pytest.mark.slow
@pytest.mark.parametrize("table", [bytes_tables, loss_table, strong_table, weak_table])
def test_the_page_holds_the_tables_as_they_are_computed(table: Callable[[], str]) -> None:
    assert table() in PAGE.read_text(), REMEDY


def test_the_pages_rows_at_four_images_a_gpu_are_the_planners() -> None:
    """A part of the slow test above, for those who change what the planner counts."""
    found = point(4096, 1024)
    cells = f"| 4,096 | 1,024 | 4 | {1e3 * found.time.seconds:.2f} ms |"
    assert cells in PAGE.read_text(), REMEDY


def test_on_1024_gpus_batch_norms_gather_outgrows_the_gradients() -> None:
    found = point(4096, 1024)
    assert found.seconds("BatchNorm") > found.seconds("gradients")
    assert found.time.bottleneck == "network"


# --- bytes handed to collectives ---------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_the_loss_sends_40_percent_less_than_a_gather_with_gradient(world: int) -> None:
    sent = _counted(world)
    ours = sent["widebatch"]
    assert ours == sent["widebatch, waiting"] == 4 * ROWS * (DIM + 3) * (world - 1)
    assert ours <= 0.6 * sent["gather, reduce-scatter"]
    assert ours <= 0.6 * sent["gather, all-reduce"]


@pytest.mark.parametrize("world", [2, 4])
def test_the_benchmarks_model_of_bytes_is_what_its_losses_hand_to_collectives(world: int) -> None:
    model = {
        name: each.bytes(ROWS, DIM, world)
        for name, each in _losses().contenders(peers=False).items()
    }
    assert _counted(world) == model


@cache
def _counted(world: int) -> dict[str, float]:
    by_rank = run_ranks(_count, world, timeout=120)
    assert by_rank == [by_rank[0]] * world
    return dict(by_rank[0])


def _count(rank: int, world: int) -> dict[str, float]:
    """Bytes that this rank sends in a step of each loss, were its collectives rings."""
    losses = _losses()
    found = losses.contenders(peers=False)
    losses.check_equal(found)  # one value, one gradient
    z_VBD = torch.randn(2, ROWS // 2, DIM, generator=torch.Generator().manual_seed(rank))
    sent = {}
    for name, contender in found.items():
        calls = _Calls(world)
        with calls:
            losses.gradient(contender, z_VBD)
        sent[name] = calls.sent
    return sent


class _Calls:
    """While entered, adds up what torch's collectives are given; unknown ones are errors."""

    def __init__(self, world: int) -> None:
        self.sent = 0.0
        self._patches = [
            self._patch("all_gather_single", 1, world - 1),
            self._patch("all_to_all_single", 1, (world - 1) / world),
            self._patch("all_reduce", 0, 2 * (world - 1) / world),
        ]
        for name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            refuse = mock.Mock(side_effect=AssertionError(f"{name} is not counted"))
            self._patches.append(mock.patch.object(dist, name, refuse))

    def _patch(self, name: str, place: int, factor: float) -> Any:
        real = getattr(dist, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            self.sent += arguments[place].nbytes * factor
            return real(*arguments, **named)

        return mock.patch.object(dist, name, counting)

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()


def _losses() -> Any:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    import _gathering_losses

    return _gathering_losses
