"""Which endings are followed by another start; what torchrun and job scripts are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import restarts
from launch.exit_codes import ExitCode

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def endings(tmp_path: Path) -> Path:
    return tmp_path / "endings"


def leave_words(folder: Path, *codes: int) -> None:
    for rank, code in enumerate(codes):
        restarts.record(code, {restarts.ENDINGS_VARIABLE: str(folder), "RANK": str(rank)})


@pytest.mark.parametrize(
    ("codes", "status", "signalled", "again"),
    [
        ((), 0, False, False),  # done
        ((75, 75), 0, False, True),  # preempted
        ((75, 75), 0, True, True),
        ((), 143, True, True),  # told to stop while it was starting
        ((74, 74), 1, False, True),
        ((), 137, False, True),  # killed, out of memory say
        ((74, 1), 1, False, False),  # one failed, the other lost it
        ((2,), 2, False, False),
        ((75, 1), 1, False, False),  # srun ended the other ranks, which saved
    ],
)
@pytest.mark.reliability(28)
def test_the_worst_ending_decides(
    endings: Path, tmp_path: Path, codes: tuple[int, ...], status: int, signalled: bool, again: bool
) -> None:
    leave_words(endings, *codes)
    decision = restarts.decide(endings, tmp_path / "run", status, signalled)
    assert decision.again is again, decision.why


def _checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest.json").write_text(json.dumps({"step": step}))


@pytest.mark.reliability(28)
def test_failures_are_counted_from_the_newest_checkpoint(endings: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def fail() -> bool:
        return restarts.decide(endings, run, 1, signalled=False, budget=2).again

    assert [fail(), fail(), fail()] == [True, True, False]
    _checkpoint(run, 10)  # somebody mended it, and it got further
    assert [fail(), fail(), fail()] == [True, True, False]


def test_a_damaged_count_starts_anew(endings: Path, tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_text('{"step": 0, "failu')
    assert restarts.decide(endings, tmp_path, 1, signalled=False).again
    assert json.loads((tmp_path / "restarts.json").read_text()) == {"step": 0, "failures": 1}


def test_a_job_script_is_told_in_two_lines(endings: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "launch.restarts", str(endings), "--out", str(tmp_path)]

    def ask(status: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, "--status", status],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert ask("0").stdout.splitlines() == ["end", "the run is done"]
    assert ask("1").stdout.splitlines()[0] == "again"
    assert ask("1", WIDEBATCH_RESTARTS="0").stdout.splitlines()[0] == "end"
    refused = ask("1", WIDEBATCH_RESTARTS="many")
    assert refused.returncode == 2
    assert "WIDEBATCH_RESTARTS='many'" in refused.stderr


def _worker(folder: Path, attempt: int) -> dict[str, str]:
    error_file = folder / "none_x" / f"attempt_{attempt}" / "0" / "error.json"
    return {
        "RANK": "0",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }


@pytest.mark.parametrize(
    ("code", "then"),
    [
        (ExitCode.FATAL, ExitCode.FATAL),
        (ExitCode.USAGE, ExitCode.USAGE),
        (ExitCode.PREEMPTED, ExitCode.PREEMPTED),
        (ExitCode.RETRYABLE, None),
    ],
)
@pytest.mark.reliability(28)
def test_a_worker_that_torchrun_starts_again_ends_as_it_did_unless_that_may_help(
    tmp_path: Path, code: ExitCode, then: ExitCode | None
) -> None:
    restarts.record(code, _worker(tmp_path, 0))
    assert restarts.refuse_hopeless(_worker(tmp_path, 0)) is None
    assert restarts.refuse_hopeless(_worker(tmp_path, 1)) == then


def test_without_a_launcher_that_starts_again_no_word_is_left(tmp_path: Path) -> None:
    restarts.record(ExitCode.FATAL, {})
    restarts.record(ExitCode.FATAL, {**_worker(tmp_path, 0), "TORCHELASTIC_MAX_RESTARTS": "0"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.reliability(28)
def test_torchrun_does_not_try_bad_input_again(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *["--nproc-per-node", "1", "--max-restarts", "1", "--no-python"],
            *[Path(sys.executable).with_name("widebatch"), "pretrain"],
            *["digits-demo", "--data.train", str(tmp_path / "missing.beton")],
            *["--out", str(tmp_path / "run"), "--device", "cpu"],
        ],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert result.stderr.count("missing.beton: ") == 1, result.stderr
    assert result.stderr.count("the attempt before ended with 2: not trying again") == 1
