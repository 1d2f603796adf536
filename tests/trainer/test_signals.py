"""A signal at any moment ends in a checkpoint, and the run that goes on equals the undisturbed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.exit_codes import ExitCode
from tests.trainer.faulty import small_config, train_with_faults
from tests.trainer.runs import assert_equal_runs, metrics, pack_images, train
from trainer.config import DataConfig, RunConfig
from trainer.features.online_knn import OnlineKnnConfig
from trainer.state.checkpoint import CheckpointConfig

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def config_for(data: Path, out: Path) -> RunConfig:
    """An evaluation after step 5, the end of the first epoch, and saves after every third step."""
    config = small_config(
        data,
        out,
        steps=STEPS,
        knn=OnlineKnnConfig(every_epochs=1, k=5, batch=30),
        checkpoint=CheckpointConfig(every_epochs=0, every_steps=3),
    )
    return dataclasses.replace(config, data=DataConfig(train=(data,), test=(data,)))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(2, config_for(data, out)) == "done"
    return out


def _signalled(
    original: Callable[..., Any], signals: list[int], after: bool, *arguments: Any, **named: Any
) -> Any:
    result = original(*arguments, **named) if after else None
    for number in signals:
        os.kill(os.getpid(), number)
    signals.clear()
    return result if after else original(*arguments, **named)


def _signal_in(place: str, signals: list[int], rank: int) -> None:
    """Send rank 1 ``signals`` when it first comes to ``place``; within a step, in the second."""
    if rank != 1:
        return
    import trainer.loop
    import trainer.prepare
    from trainer.features.online_knn import OnlineKnn
    from trainer.state.checkpoint import CheckpointSaver

    owner, name = {
        "step": (trainer.loop, "gradient_norm"),
        "save": (CheckpointSaver, "save"),
        "load": (trainer.prepare, "agreed_checkpoint"),
        "evaluation": (OnlineKnn, "evaluate"),
    }[place]
    original = getattr(owner, name)

    # Until a start's first step is done there is nothing to save.
    still_to_come = [original] if place == "step" else []

    def signalled(*arguments: Any, **named: Any) -> Any:
        if still_to_come:
            return still_to_come.pop()(*arguments, **named)
        # After a load, whose exchange the others have then made too: they wait in the next.
        return _signalled(original, signals, place == "load", *arguments, **named)

    setattr(owner, name, signalled)


@pytest.mark.reliability(22)
@pytest.mark.parametrize(
    ("place", "signals", "last_step"),
    [
        ("step", [signal.SIGTERM], 2),
        pytest.param("save", [signal.SIGUSR1, signal.SIGTERM], 4, marks=pytest.mark.slow),
        pytest.param("evaluation", [signal.SIGUSR1], 5, marks=pytest.mark.slow),
        pytest.param("step", [signal.SIGTERM] * 2, 2, marks=pytest.mark.slow),
        pytest.param("save", [signal.SIGTERM], 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_in_a_checkpoint_and_the_resumed_run_is_equal(
    data: Path, tmp_path: Path, undisturbed: Path, place: str, signals: list[int], last_step: int
) -> None:
    """To one rank."""
    config = config_for(data, tmp_path / "run")
    said = train_with_faults(2, config, spoil=partial(_signal_in, place, list(map(int, signals))))
    assert all("ended: stopped" in (text or "") for text in said)
    assert metrics(config.out)[-1]["step"] == last_step
    assert train(2, config) == "done"
    assert_equal_runs(config.out, undisturbed)


@pytest.mark.reliability(22)
@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], pytest.param([signal.SIGUSR1] * 2, marks=pytest.mark.slow)],
)
def test_a_signal_in_a_load_ends_at_once_and_the_checkpoint_serves(
    data: Path, tmp_path: Path, undisturbed: Path, signals: list[int]
) -> None:
    """To one rank, before its first step: nothing is to be saved, and the others lose it."""
    config = config_for(data, tmp_path / "run")
    assert train(2, config, stop_at=2) == "stopped"
    exits = {0: int(ExitCode.RETRYABLE), 1: int(ExitCode.PREEMPTED)}
    spoil = partial(_signal_in, "load", list(map(int, signals)))
    train_with_faults(2, config, exits=exits, spoil=spoil)
    assert metrics(config.out)[-1]["step"] == 2
    assert train(2, config) == "done"
    assert_equal_runs(config.out, undisturbed)


@pytest.mark.slow
@pytest.mark.reliability(22)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_says_that_it_was_preempted(
    data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Signalled twice, the second time while the checkpoint is on its way."""
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "launch", "pretrain", "simclr-cifar10-r18"),
        *("--data.train", str(data), "--out", str(out), "--batch", "24", "--steps", "100000"),
        *("--precision", "fp32", "--device", "cpu", "--loader.backend", "torchvision"),
        *("--encoder.name", "tests.trainer.runs:small_encoder", "--telemetry.log-every", "1"),
        *("--telemetry.no-tensorboard", "--encoder.image-size", "32"),
        *("--encoder.stem", "imagenet", "--encoder.no-zero-init-residual"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not metrics(out):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline, "it never took a step"
            time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == ExitCode.PREEMPTED
    assert f"{number.name}: a checkpoint follows" in said
    assert (out / "checkpoints" / "latest.json").exists()


def _break_decoding(rank: int) -> None:
    if rank != 1:
        return
    from data_pipeline.reading.torchvision_loader import TorchvisionDecoder

    calls = iter(range(1000))
    try_decode = TorchvisionDecoder.try_decode

    def breaking(self: TorchvisionDecoder, *arguments: Any) -> Any:
        if next(calls) >= 10:
            raise MemoryError("the worker is gone")
        return try_decode(self, *arguments)

    TorchvisionDecoder.try_decode = breaking  # type: ignore[method-assign]


@pytest.mark.reliability(23)
def test_a_loader_worker_that_dies_ends_the_run_with_its_rank_named(
    data: Path, tmp_path: Path
) -> None:
    """Workers are threads: what ends one reaches the rank that waits for it, and the others."""
    config = small_config(data, tmp_path / "run", steps=40)
    exits = {0: int(ExitCode.RETRYABLE), 1: int(ExitCode.FATAL)}
    said = train_with_faults(2, config, exits=exits, spoil=_break_decoding)
    assert "ended: MemoryError: the worker is gone" in (said[1] or "")
    assert "ended: RankLostError" in (said[0] or "")
    assert "rank 1 has ended (MemoryError)" in (said[0] or "")
