"""A run that hangs or loses a rank ends in time, and says which rank and which collective."""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from common.collectives import AgreedFlags
from common.errors import ConfigError
from launch.exit_codes import ExitCode
from tests.faults import armed
from tests.trainer.faulty import RETRYABLE, WATCHED, small_config, train_with_faults
from tests.trainer.runs import (
    assert_equal_runs,
    checkpoint_bytes,
    metrics,
    pack_images,
    train,
    train_all,
)
from tests.trainer.sleeper import sleeping_rank, suspend
from trainer.config import RunConfig
from trainer.health import heartbeat, watchdog
from trainer.health.collapse import CollapseConfig
from trainer.health.heartbeat import Heartbeat, Looks, verdict
from trainer.health.phases import Phases
from trainer.health.stragglers import StragglerConfig
from trainer.health.watchdog import RETRYABLE_STATUS, Watchdog, WatchdogConfig
from trainer.telemetry import TelemetryConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def stacks(run: Path) -> dict[int, str]:
    """What each rank wrote before it ended itself."""
    return {int(p.name.split("-")[1]): p.read_text() for p in (run / "stacks").iterdir()}


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.reliability(16)
def test_a_rank_that_comes_to_no_collective_ends_the_run_and_is_named(
    data: Path, tmp_path: Path
) -> None:
    config = small_config(data, tmp_path / "run", watchdog=WATCHED)
    faults = "step.start rank=1 pass=3 sleep:600"
    train_with_faults(2, config, faults, exits={0: RETRYABLE, 1: RETRYABLE})
    found = stacks(config.out)
    assert found.keys() == {0, 1}, "every rank writes its stacks"
    for rank, text in found.items():
        assert "most recent call first" in text
        assert "rank 1 did not join: it is at step 3, loader" in text, f"rank {rank}: {text}"
        assert "1 of 2 ranks are in 'batch norm: all-gather of statistics'" in text
    assert "in over_group" in found[0], "the innermost frames are there"
    assert oct(next((config.out / "stacks").iterdir()).stat().st_mode)[-3:] == "600"


def _skip_flags_once(rank: int) -> None:
    post, calls = AgreedFlags.post, iter(range(1, 1000))

    def skipping(self: AgreedFlags, **values: bool) -> None:
        if not (rank == 1 and next(calls) == 3):
            post(self, **values)

    AgreedFlags.post = skipping  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.reliability(16)
def test_a_rank_that_skips_a_collective_ends_the_run_and_is_named(
    data: Path, tmp_path: Path
) -> None:
    """It goes on, and meets the others in the wrong collective: gloo reports it, or all hang."""
    config = small_config(data, tmp_path / "run", watchdog=WATCHED)
    exits = dict.fromkeys(range(3), RETRYABLE)
    said = train_with_faults(3, config, exits=exits, spoil=_skip_flags_once)
    reports = "\n".join([*(text or "" for text in said), *stacks(config.out).values()])
    assert "2 of 3 ranks are in 'agreed flags: all-reduce'; rank 1 is in another:" in reports, (
        reports
    )


@pytest.mark.slow
@pytest.mark.reliability(3)
def test_a_killed_rank_ends_all_and_the_resumed_run_is_equal(data: Path, tmp_path: Path) -> None:
    straight = small_config(data, tmp_path / "straight", watchdog=WATCHED)
    assert train(4, straight) == "done"
    config = dataclasses.replace(straight, out=tmp_path / "run")
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=2)
    )
    exits = {0: RETRYABLE, 1: RETRYABLE, 2: -signal.SIGKILL, 3: RETRYABLE}
    said = train_with_faults(4, config, "step.start rank=2 pass=4 kill", exits=exits)
    assert "RankLostError" in (said[0] or "")
    assert "rank 2 is gone" in (said[0] or "")
    assert train(4, config) == "done"
    assert_equal_runs(config.out, straight.out)


@pytest.mark.slow
@pytest.mark.reliability(17)
def test_a_rank_that_is_stopped_for_five_seconds_is_a_warning(data: Path, tmp_path: Path) -> None:
    config = small_config(
        data, tmp_path / "run", watchdog=WatchdogConfig(timeout=60, patience=120, warning=2)
    )
    waker = threading.Thread(target=_wake_after, args=(config.out, 1, 5.0))
    waker.start()
    said = train_with_faults(2, config, "step.start rank=1 pass=3 stop")
    waker.join()
    assert all("ended: done" in (text or "") for text in said)
    assert "this process stood still for" in (said[1] or "")
    assert "[rank 0] no progress for" in (said[0] or "")
    assert "rank 1 is stopped" in (said[0] or "")
    assert not list((config.out / "stacks").iterdir())


def _wake_after(run: Path, rank: int, seconds: float) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = heartbeat.read(run / "heartbeats", range(rank + 1)).get(rank)
        if found is not None and heartbeat.process_state(found) == "stopped":
            time.sleep(seconds)
            os.kill(found.pid, signal.SIGCONT)
            return
        time.sleep(0.1)


_WORKERS = ("--nproc-per-node=2", "--max-restarts=1")


def _command(config: RunConfig, data: Path) -> list[str]:
    return [
        *("pretrain", "simclr-cifar10-r18", "--data.train", str(data), "--out", str(config.out)),
        *("--batch", "24", "--steps", "6", "--precision", "fp32", "--device", "cpu"),
        *("--log-samples", "--crop.size", "32", "--encoder.name", config.encoder.name),
        *("--encoder.image-size", "32", "--head.out-dim", "32", "--loader.backend", "torchvision"),
        *("--encoder.stem", "imagenet", "--encoder.no-zero-init-residual"),
        *("--loader.workers", "1", "--telemetry.log-every", "2", "--telemetry.no-tensorboard"),
        *("--checkpoint.every-steps", "2", "--watchdog.timeout", "12"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.reliability(17)
def test_a_rank_that_is_stopped_for_ever_is_killed_and_the_run_restarted(
    data: Path, tmp_path: Path
) -> None:
    """torchrun ends what the others leave behind, and starts all again."""
    for name in ("straight", "run"):
        config = small_config(data, tmp_path / name)
        fault = "step.start rank=1 pass=4 attempt=0 stop" if name == "run" else ""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*torchrun, *_WORKERS, "-m", "launch", *_command(config, data)],
            env={**os.environ, "WIDEBATCH_FAULTS": armed(fault), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
    assert "rank 1 is stopped" in done.stderr
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def test_watching_changes_no_number(data: Path, tmp_path: Path) -> None:
    """Everything on, at every step, beside nothing at all."""
    often = TelemetryConfig(tensorboard=False, log_every=1)
    on = small_config(
        data, tmp_path / "on", telemetry=often, collapse=CollapseConfig(every_steps=1)
    )
    off = small_config(
        data,
        tmp_path / "off",
        telemetry=often,
        watchdog=WatchdogConfig(timeout=0),
        straggler=StragglerConfig(factor=0),
        collapse=CollapseConfig(every_steps=0),
    )
    assert train_all(2, [(on, 0), (off, 0)]) == ["done", "done"]
    assert checkpoint_bytes(on.out) == checkpoint_bytes(off.out)
    added = ("feature_std", "effective_rank")
    assert [{k: v for k, v in r.items() if k not in added} for r in metrics(on.out)] == metrics(
        off.out
    )
    assert all("feature_std" in record for record in metrics(on.out))


# --- its parts ----------------------------------------------------------------------------------


def beat(rank: int, **more: object) -> Heartbeat:
    return dataclasses.replace(
        Heartbeat(rank=rank, host="elsewhere", pid=1, started=1, beat=5, collectives=9),
        **{"step": 4, "phase": "backward", "waiting": "sums: all-reduce", **more},
    )


def verdict_of(*beats: Heartbeat, first: dict[int, int] | None = None) -> str:
    return verdict(Looks(0, first or {}, {found.rank: found for found in beats}), 3)


def test_the_verdict_names_the_rank_that_has_not_joined() -> None:
    late = beat(2, collectives=8, waiting="", phase="forward")
    assert verdict_of(beat(0), beat(1), late) == (
        "2 of 3 ranks are in 'sums: all-reduce'; rank 2 did not join: it is at step 4, forward"
    )


def test_the_verdict_names_ranks_that_are_silent_ended_or_never_came() -> None:
    found = verdict_of(beat(0), beat(1), beat(2, ended="DataError"), first={1: 5, 2: 4})
    assert "1 of 3 ranks are in 'sums: all-reduce'" in found
    assert "rank 1 is silent (pid 1 on elsewhere, last at step 4, backward" in found
    assert "rank 2 has ended (DataError)" in found
    assert "rank 1 has never reported" in verdict_of(beat(0))


def test_the_verdict_blames_no_rank_that_lost_another() -> None:
    found = verdict_of(beat(0), beat(1, ended="RankLostError"), beat(2, ended="OSError"))
    assert "rank 1" not in found and "rank 2 has ended (OSError)" in found


def test_the_verdict_names_the_rank_that_is_in_another_collective() -> None:
    assert verdict_of(beat(0), beat(1, waiting="rows: all-gather"), beat(2)) == (
        "2 of 3 ranks are in 'sums: all-reduce'; rank 1 is in another: step 4, backward in 'rows:"
        " all-gather'"
    )


def test_the_verdict_suspects_the_network_where_all_have_joined() -> None:
    assert "all ranks have joined" in verdict_of(*(beat(rank) for rank in range(3)))


def test_a_heartbeat_comes_back_as_it_was_and_a_foreign_file_does_not(tmp_path: Path) -> None:
    mine = dataclasses.replace(heartbeat.own(3), step=7, phase="forward", still_seconds=0.5)
    heartbeat.write(tmp_path / "beats", mine)
    assert heartbeat.read(tmp_path / "beats", range(5)) == {3: mine}
    for text in ("", "[]", "{}", '{"rank": 3}', (tmp_path / "beats/rank-00003.json").read_text()):
        (tmp_path / "beats" / "rank-00001.json").write_text(text)
        assert heartbeat.read(tmp_path / "beats", range(5)) == {3: mine}


def test_a_process_is_seen_to_be_stopped_and_gone() -> None:
    with sleeping_rank() as (sleeper, found):
        assert heartbeat.process_state(found) == ""
        suspend(sleeper, found)
        assert heartbeat.process_state(found) == "stopped"
    assert heartbeat.process_state(found) == "gone"
    assert heartbeat.process_state(dataclasses.replace(found, host="elsewhere")) == ""


def test_another_process_with_the_pid_is_not_taken_for_the_rank() -> None:
    mine = heartbeat.own(0)
    assert heartbeat.process_state(dataclasses.replace(mine, started=mine.started - 1)) == "gone"


def test_its_exit_status_is_the_one_of_runs_that_may_be_tried_again() -> None:
    assert RETRYABLE_STATUS == ExitCode.RETRYABLE


@pytest.mark.parametrize("setting", ["timeout", "patience", "warning"])
def test_settings_are_seconds_from_zero(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"watchdog.{setting}"):
        WatchdogConfig(**{setting: -1.0})


def test_a_run_that_ended_leaves_word_and_no_stacks(tmp_path: Path) -> None:
    phases = Phases(torch.device("cpu"))
    dog = Watchdog(WatchdogConfig(), phases, tmp_path, rank=0, world_size=3)
    with contextlib.suppress(KeyError), dog.watching():
        raise KeyError("the key\n is lost")
    left = heartbeat.read(tmp_path / "heartbeats", range(3))[0]
    assert (left.ended, left.why) == ("KeyError", r"'the key\n is lost'")
    assert not list((tmp_path / "stacks").iterdir())


def test_a_run_that_was_cleared_away_does_not_come_back(tmp_path: Path) -> None:
    dog = Watchdog(WatchdogConfig(), Phases(torch.device("cpu")), tmp_path, rank=1, world_size=2)
    with dog.watching():
        shutil.rmtree(tmp_path / "heartbeats")
        shutil.rmtree(tmp_path / "stacks", ignore_errors=True)
    assert not (tmp_path / "heartbeats").exists()


def test_a_standstill_is_told_unless_the_first_step_compiles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_STANDSTILL", 0.3)
    phases = Phases(torch.device("cpu"))
    dog = Watchdog(WatchdogConfig(warning=0.4), phases, tmp_path, rank=0, world_size=1)
    with dog.watching():
        told = []
        for step in (1, 2):
            phases.step(step)
            time.sleep(0.3)
            ctypes.PyDLL(None).usleep(900_000)  # keeps the interpreter's lock, as a compiler does
            time.sleep(0.3)
            told.append(caplog.text.count("stood still"))
    assert told[0] == 0 < told[1]


_HOLDS_THE_LOCK = """
import ctypes, sys, torch
from pathlib import Path
from trainer.health import watchdog
from trainer.health.phases import Phases
watchdog._SLACK = 1.0
config = watchdog.WatchdogConfig(timeout=1.0, patience=1.0)
dog = watchdog.Watchdog(
    config, Phases(torch.device("cpu")), Path(sys.argv[1]), rank=0, world_size=1
)
with dog.watching():
    import time
    time.sleep(0.8)
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock, as a defect in native code would
"""


def test_a_process_is_ended_that_holds_the_interpreter_lock_for_ever(tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _HOLDS_THE_LOCK, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        timeout=100,
    )
    assert done.returncode not in (0, None)
    assert time.monotonic() - started < 58, "it slept to the end"
    assert "most recent call first" in stacks(tmp_path)[0]
    assert watchdog._SLACK == 30
