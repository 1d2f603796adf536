"""The Triton augmentation without a GPU: interpreted, and as machine code for GPUs elsewhere."""

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.augment.plan import plan_launch
from tests.kernels.compile_cases import CompileCase, case_named
from tests.kernels.interpreter import run_interpreted


def test_pixels_in_the_interpreter() -> None:
    run_interpreted("augment")


@pytest.mark.slow
@pytest.mark.timeout(1600)  # the interpreter takes minutes
def test_more_sizes_in_the_interpreter() -> None:
    run_interpreted("augment", slow=True)


def compiled(case: CompileCase) -> str:
    """PTX for an H100."""
    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return str(triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"])


def test_a_gpu_rounds_to_bfloat16_and_sees_what_its_threads_have_written() -> None:
    """What the interpreter cannot show: it truncates, and runs one thread."""
    ptx = compiled(case_named("augment bf16 224x224"))
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx)
    assert "cvt.rz.bf16" not in ptx
    # Ring and strip are written and read by one launch: the read-only cache would not notice.
    assert "ld.global.nc" not in ptx
    assert "bar.sync" in ptx


@pytest.mark.parametrize("side", [1, 7, 32, 95, 96, 224, 384])
def test_a_ring_holds_a_strip_and_its_neighbours(side: int) -> None:
    for radius in {0, side // 20, side - 1}:
        launch = plan_launch(side, side, radius)
        assert 1 <= launch.strip <= side
        assert launch.ring == min(side, launch.strip + 2 * radius)
