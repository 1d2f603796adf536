"""Whole runs whose checkpoints meet full disks and kills: they go on, or end so that they can.

MoCo v2, because it has all that a checkpoint can lose: a queue and a key encoder besides weights,
optimizer and BatchNorm statistics.
"""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from common import fault_injection
from launch.exit_codes import ExitCode, exit_code_for
from tests.dist import run_ranks
from tests.faults import armed
from tests.trainer.disks import small_tmpfs
from tests.trainer.runs import SMALL_ENCODER, assert_equal_runs, pack_images, train
from tests.trainer.tiny import tiny_mocov2_config
from trainer.config import RunConfig, from_json, to_json
from trainer.state.checkpoint import CheckpointConfig, CheckpointStore

STEPS = 8  # one epoch of five and three steps of the next


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def config_of(data: Path, out: Path, **checkpoint: Any) -> RunConfig:
    saves = CheckpointConfig(**{"every_epochs": 0, "every_steps": 2, **checkpoint})
    return tiny_mocov2_config(data, out, encoder=SMALL_ENCODER, steps=STEPS, checkpoint=saves)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(data, tmp_path_factory.mktemp("undisturbed") / "run")
    assert train(2, config) == "done"
    return config.out


def _train_with(
    rank: int, world_size: int, runs: list[tuple[dict[str, Any], str]]
) -> list[list[Any]]:
    """Of each run and its faults: the outcome, or the exit code and the error; what was logged."""
    from trainer.loop import fit

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.state.checkpoint").addHandler(handler)
    ends = []
    for values, faults in runs:
        said.clear()
        os.environ[fault_injection.VARIABLE] = armed(faults)
        try:
            ends.append([fit(from_json(RunConfig, values)).value, "\n".join(said)])
        except OSError as error:
            ends.append([int(exit_code_for(error)), f"{error}\n" + "\n".join(said)])
        except RuntimeError as error:  # another rank is gone
            ends.append(["lost", str(error)])
    return ends


def train_with(*runs: tuple[RunConfig, str], killed: int | None = None) -> list[list[list[Any]]]:
    """Train on two processes with faults; how each run ended, by rank."""
    values = [(to_json(config), armed) for config, armed in runs]
    return run_ranks(
        _train_with,
        2,
        values,
        timeout=240,
        init_process_group=False,
        expected_exits=None if killed is None else {killed: -9},
    )


def assert_no_temporary_files(run: Path) -> None:
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.reliability(6)
def test_a_failed_save_is_said_and_repeated_ones_end_the_run_on_all_ranks_as_retryable(
    data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    once = config_of(data, tmp_path / "once")
    often = config_of(data, tmp_path / "often", every_steps=1, max_failures=3)
    by_rank = train_with(
        (once, "checkpoint.manifest pass=2 raise:ENOSPC"),
        (often, "checkpoint.manifest pass=2+ raise:ENOSPC"),
    )
    outcomes = [[end[0] for end in ends] for ends in by_rank]
    assert outcomes == [["done", ExitCode.RETRYABLE]] * 2
    assert "checkpoint of step 4 could not be written: [Errno 28] No space left" in by_rank[0][0][1]
    assert_equal_runs(once.out, undisturbed)
    for ends in by_rank:
        assert "No space left on device" in ends[1][1]
    newest = CheckpointStore(often.out / "checkpoints").newest()
    assert newest is not None
    assert newest.step == 1
    for run in (once, often):
        assert_no_temporary_files(run.out)


@pytest.mark.reliability(6)
def test_a_run_on_a_disk_that_fills_up_ends_as_retryable_and_goes_on_when_there_is_room(
    data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    newest = CheckpointStore(undisturbed / "checkpoints").newest()
    assert newest is not None
    checkpoint = sum(path.stat().st_size for path in newest.path.iterdir())
    with small_tmpfs(tmp_path / "disk", int(2.5 * checkpoint) + (64 << 10)) as disk:
        full = config_of(data, disk / "run", every_steps=1, max_failures=2)
        by_rank = train_with((full, ""))
        for ((code, text),) in by_rank:
            assert code == ExitCode.RETRYABLE
            assert os.strerror(errno.ENOSPC) in text
        found = CheckpointStore(full.out / "checkpoints").newest()
        assert found is not None
        assert found.step == 2
        assert_no_temporary_files(full.out)
        more_room = tmp_path / "run"
        shutil.copytree(full.out, more_room)
    assert train(2, config_of(data, more_room)) == "done"
    assert_equal_runs(more_room, undisturbed)


@pytest.mark.reliability(5)
@pytest.mark.slow
def test_rank_0_killed_during_an_asynchronous_write_loses_that_checkpoint_alone(
    data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The write of step 4 does not end; training has gone on, and is in step 6, at the kill."""
    config = config_of(data, tmp_path / "run")
    armed = "checkpoint.manifest pass=2 sleep:600; step.start pass=6 rank=0 kill"
    by_rank = train_with((config, armed), killed=0)
    assert by_rank[1][0][0] == "lost"
    folder = config.out / "checkpoints"
    assert list(folder.glob(".writing-step-00000004"))
    found = CheckpointStore(folder).newest()
    assert found is not None
    assert found.step == 2
    assert train(2, config) == "done"
    assert_equal_runs(config.out, undisturbed)
    assert_no_temporary_files(config.out)


@pytest.mark.reliability(4)
@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [p for p in fault_injection.POINTS if p.startswith("checkpoint.")]
)
def test_a_run_killed_at_a_named_point_of_a_save_goes_on_as_if_nothing_had_been(
    data: Path, tmp_path: Path, undisturbed: Path, point: str
) -> None:
    newest = CheckpointStore(undisturbed / "checkpoints").newest()
    assert newest is not None
    manifest = json.loads((newest.path / "manifest.json").read_text())
    tensors = sum(len(file.get("tensors", ())) for file in manifest["files"].values())
    passing = {
        "checkpoint.write": tensors * 3 // 2,  # one a tensor, and a few
        "checkpoint.sync": 12,  # eight a save, and one
        "checkpoint.retire": 1,  # in the third save, the first that has something to retire
    }.get(point, 2)
    config = config_of(data, tmp_path / "run")
    train_with((config, f"{point} pass={passing} rank=0 kill"), killed=0)
    found = CheckpointStore(config.out / "checkpoints").newest()
    assert found is not None
    assert found.step in (2, 4, 6)
    assert train(2, config) == "done"
    assert_equal_runs(config.out, undisturbed)
    assert_no_temporary_files(config.out)
