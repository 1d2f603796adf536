"""Fault points do nothing until they are armed, and then exactly what the text says."""

import ast
import errno
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import fault_injection
from common.errors import DataError
from common.fault_injection import Fault
from launch.exit_codes import ExitCode, exit_code_for
from tests.faults import armed, parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    fault_injection.arm([])


def points_in_the_code() -> dict[str, set[str]]:
    """Names of points by the function that they are an argument of, ``at`` or ``tensor``."""
    found: dict[str, set[str]] = {"at": set(), "tensor": set()}
    for package in ("launch", "trainer", "data_pipeline", "kernels", "common"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "fault_injection"
                    and node.func.attr in found
                ):
                    assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: no name"
                    found[node.func.attr].add(node.args[0].value)
    return found


def test_every_point_of_the_table_stands_in_the_code_and_every_point_in_the_table() -> None:
    found = points_in_the_code()
    assert found["at"] == set(fault_injection.POINTS)
    assert found["tensor"] == set(fault_injection.TENSOR_POINTS)
    assert not set(fault_injection.POINTS) & set(fault_injection.TENSOR_POINTS)


def test_a_point_does_nothing_unless_armed() -> None:
    fault_injection.at("step.start")
    tensor = torch.ones(2)
    assert fault_injection.tensor("step.backward", tensor) is tensor


def test_a_text_says_point_conditions_and_action() -> None:
    assert fault_injection.parse("") == []
    text = armed(
        "checkpoint.rename rank=0 pass=2 kill; step.backward pass=3-5 nan;"
        "checkpoint.sync pass=2+ raise:ENOSPC; step.start attempt=1 sleep:0.5;"
    )
    assert fault_injection.parse(text) == [
        Fault(point="checkpoint.rename", rank=0, first=2, last=2, action="kill"),
        Fault(point="step.backward", first=3, last=5, action="nan"),
        Fault(point="checkpoint.sync", first=2, last=math.inf, action="raise", errno="ENOSPC"),
        Fault(point="step.start", attempt=1, action="sleep", seconds=0.5),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"point": "checkpoint.renam", "action": "kill"}]',
            "'checkpoint.renam' is no fault point; there are checkpoint.",
        ),
        ('[{"point": "step.start"}]', "missing 1 required keyword-only argument: 'action'"),
        (
            '[{"point": "step.start", "action": "explode"}]',
            "'explode' is no action at step.start",
        ),
        ('[{"point": "step.start", "action": "nan"}]', "'nan' is no action at step.start"),
        (
            '[{"point": "step.start", "action": "raise", "errno": "NONSENSE"}]',
            "'NONSENSE' is no errno",
        ),
        ('[{"point": "step.start", "action": "kill", "when": 1}]', "'when'"),
        ("step.start kill", "Expecting value"),
        ("1", "not iterable"),
    ],
)
def test_a_text_that_says_anything_else_is_refused_as_bad_input(text: str, message: str) -> None:
    with pytest.raises(DataError, match="WIDEBATCH_FAULTS: ") as caught:
        fault_injection.parse(text)
    assert message in str(caught.value)
    assert exit_code_for(caught.value) == ExitCode.USAGE


def test_a_fault_happens_at_its_passings_only() -> None:
    fault_injection.arm(parse("step.start pass=2-3 raise:EIO"))
    for passing in range(1, 6):
        fault_injection.at("checkpoint.rename")  # other points have counts of their own
        if passing in (2, 3):
            with pytest.raises(OSError, match=r"injected at step\.start") as caught:
                fault_injection.at("step.start")
            assert caught.value.errno == errno.EIO
        else:
            fault_injection.at("step.start")


def test_faults_of_other_ranks_and_attempts_are_not_armed() -> None:
    environ = {fault_injection.VARIABLE: armed("step.start rank=1 attempt=1 raise:EIO")}
    fault_injection.arm_from(environ, rank=1)
    fault_injection.at("step.start")
    fault_injection.arm_from(environ | {"SLURM_RESTART_COUNT": "1"}, rank=0)
    fault_injection.at("step.start")
    fault_injection.arm_from(environ | {"TORCHELASTIC_RESTART_COUNT": "1"}, rank=1)
    with pytest.raises(OSError, match="injected"):
        fault_injection.at("step.start")
    fault_injection.arm_from({}, rank=1)
    fault_injection.at("step.start")


def test_a_tensor_becomes_nan_and_so_does_what_is_derived_from_it() -> None:
    fault_injection.arm(parse("step.backward pass=2 nan"))
    weight = torch.ones(3, requires_grad=True)
    for is_nan in (False, True, False):
        (gradient,) = torch.autograd.grad(
            fault_injection.tensor("step.backward", weight.sum()), weight
        )
        assert gradient.isnan().all() == is_nan


def test_sleep_takes_its_time() -> None:
    fault_injection.arm(parse("step.start sleep:0.2"))
    start = time.monotonic()
    fault_injection.at("step.start")
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(("action", "number"), [("kill", "SIGKILL"), ("stop", "SIGSTOP")])
def test_kill_and_stop_are_signals_to_the_own_process(action: str, number: str) -> None:
    child = os.fork()
    if child == 0:
        fault_injection.arm(parse(f"step.start {action}"))
        fault_injection.at("step.start")
        os._exit(0)  # stopped: after SIGCONT
    _, status = os.waitpid(child, os.WUNTRACED)
    if action == "stop":
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.Signals[number]
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        assert os.WEXITSTATUS(status) == 0
    else:
        assert os.WTERMSIG(status) == signal.Signals[number]
