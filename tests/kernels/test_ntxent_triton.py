"""The Triton NT-Xent without a GPU: in the interpreter, and what needs no kernel to run."""

import logging

import pytest
import torch

from benchmarks.roofline import flop_count
from kernels import dispatch
from kernels.ntxent import nt_xent
from kernels.ntxent.ops import choose
from kernels.ntxent.triton import tile_config
from tests.kernels.interpreter import run_interpreted


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("ntxent")


@pytest.mark.slow
@pytest.mark.timeout(1600)  # the interpreter takes minutes
def test_kernels_in_the_interpreter_on_the_grid() -> None:
    run_interpreted("ntxent", slow=True)


def test_without_a_gpu_triton_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="Triton does not run on cpu"):
        nt_xent(torch.randn(2, 4, 8), implementation="triton")


def test_auto_takes_what_runs_and_says_why() -> None:
    cpu = choose(torch.device("cpu"), torch.float32, 128, "auto")
    assert (cpu.implementation, cpu.fallback) == ("blocked", False)
    wide = choose(torch.device("cuda"), torch.bfloat16, 1024, "auto")
    assert (wide.implementation, wide.fallback) == ("blocked", True)
    assert "1 to 512 dimensions, not 1024" in wide.reason
    double = choose(torch.device("cuda"), torch.float64, 128, "auto")
    assert (double.implementation, double.fallback) == ("blocked", True)


def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="kernels.dispatch"):
        for _ in range(3):
            nt_xent(torch.randn(2, 4, 8))
        for _ in range(2):
            dispatch.record(dispatch.Choice("ntxent", "blocked", "no Triton", fallback=True))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("DEBUG", "ntxent: blocked: Triton does not run on cpu"),
        ("WARNING", "ntxent: falling back to blocked: no Triton"),
    ]


def test_symmetry_halves_the_forward_pass() -> None:
    rows, dim = 65536, 128
    plain = flop_count(rows, rows, dim, symmetric=False)
    shared = flop_count(rows, rows, dim)
    assert plain.forward == 2 * rows**2 * dim
    assert plain.total == 6 * rows**2 * dim
    assert shared.forward / plain.forward == pytest.approx(0.5, abs=0.001)
    assert shared.backward == plain.backward == 4 * rows**2 * dim
    # One of 8 ranks: only its own block is symmetric.
    eighth = flop_count(rows // 8, rows, dim)
    assert eighth.forward / (plain.forward / 8) == pytest.approx(15 / 16, abs=0.001)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [1, 32, 96, 128, 300, 512])
def test_a_tile_is_what_tensor_cores_take(
    dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    for config in tile_config(dim, dtype, capability):
        for size in (config.rows, config.columns, config.chunk):
            assert size >= 16
            assert size & (size - 1) == 0, "a power of two"
