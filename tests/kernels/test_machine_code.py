"""What every Triton kernel becomes on A100, H100 and B200, compiled here without any of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from tests.kernels import machine_code
from tests.kernels.compile_cases import KERNELS, case_named
from tests.kernels.machine_code import ARCHITECTURES, Report, compile_case, table

ROOT = Path(__file__).parents[2]
# SimCLR's loss as it trains: 16-bit rows of 128 dimensions, tau = 0.1.
QUICK = ("ntxent.own_block bf16 D=128 (plain)", "ntxent.gradient bf16 D=128 (own)")


def test_every_kernel_is_listed_and_every_case_has_a_name_of_its_own() -> None:
    cases = [case for listed in KERNELS.values() for case in listed()]
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    listed = {case.kernel.__name__ for case in cases}
    for path in (ROOT / "kernels").rglob("triton*.py"):
        launched = re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        assert set(launched) <= listed, path


@pytest.mark.parametrize("name", QUICK)
def test_the_loss_of_simclr_neither_spills_nor_misses_the_tensor_cores(name: str) -> None:
    case = case_named(name)
    for architecture in ARCHITECTURES:
        report = compile_case(case, architecture)
        assert not report.problems, report
        assert 16 < report.registers <= 255
    # mma.sync would leave an H100 at half its rate.
    assert "HGMMA" in compile_case(case, 90).tensor_cores
    assert "UTCHMMA" in compile_case(case, 100).tensor_cores


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_configuration_keeps_the_limits(kernels: str) -> None:
    reports = [
        compile_case(case, architecture)
        for case in KERNELS[kernels]()
        for architecture in ARCHITECTURES
    ]
    broken = [report for report in reports if report.problems]
    assert not broken, "\n" + table(broken)


def test_a_broken_limit_is_seen() -> None:
    case = case_named(QUICK[0])
    # A tile of 128 x 128 by one warp cannot be held in registers.
    spilling = compile_case(dataclasses.replace(case, warps=1), 80)
    assert any("local memory" in problem for problem in spilling.problems)
    constants = {**case.constants, "BLOCK_M": 128, "SIZE_D": 512, "CHUNK": 512}
    large = compile_case(dataclasses.replace(case, constants=constants), 80)
    assert any("shared memory" in problem for problem in large.problems)
    signature = {name: type_ for name, type_ in case.signature.items() if name != "row_pointer"}
    unknown = compile_case(dataclasses.replace(case, signature=signature), 80)
    assert any("without a type" in problem for problem in unknown.problems)


def test_the_command_prints_the_table_and_fails_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(case: object, architecture: int) -> Report:
        problems = ("3 accesses to local memory",) if architecture == 90 else ()
        return Report(
            name="kernel", architecture=architecture, warps=4, stages=2, problems=problems
        )

    monkeypatch.setattr(machine_code, "compile_case", report)
    only = ["--only", QUICK[0]]
    assert machine_code.main(["--arch", "80", *only]) == 0
    assert machine_code.main(["--arch", "80", "90", *only]) == 1
    assert "! 3 accesses to local memory" in capsys.readouterr().out
    assert machine_code.main(["--json", "--arch", "80", *only]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == 80
    assert machine_code.main(["--only", "no such kernel"]) == 1, "nothing compiled is no success"
