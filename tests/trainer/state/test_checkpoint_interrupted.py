"""A save that is killed, fails or fills the disk keeps a whole checkpoint."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest

from common import fault_injection
from common.fault_injection import Fault
from launch.exit_codes import ExitCode, exit_code_for
from tests.faults import parse
from tests.trainer.checkpoints import newest_step, parts, save, whole_steps
from tests.trainer.disks import small_tmpfs
from trainer.state.checkpoint import CheckpointConfig, CheckpointSaver, CheckpointStore

SAVE_POINTS = [point for point in fault_injection.POINTS if point.startswith("checkpoint.")]


@pytest.mark.reliability(4)
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_at_a_named_point_of_a_save_keeps_a_whole_checkpoint(
    tmp_path: Path, point: str
) -> None:
    """SIGKILL at the n-th passing of the point, for every n, until a save gets through."""
    before = tmp_path / "before"
    for step in (1, 2):
        save(CheckpointStore(before), step)
    for passing in itertools.count(1):
        folder = tmp_path / f"after-{passing}"
        shutil.copytree(before, folder)
        survived = _killed_in_a_save(folder, point, passing)
        store = CheckpointStore(folder)
        found = store.newest()
        assert found is not None, f"nothing left after a kill at {point}, {passing}"
        assert found.step in (2, 3)
        assert found.tensors("optimizer")["m"].tolist() == [found.step] * 2
        save(store, 4)
        assert newest_step(store) == 4
        assert not list(folder.glob(".writing-*"))
        assert whole_steps(folder) >= {found.step, 4}
        if survived:
            break
    assert found.step == 3
    assert passing > 1, "the point was not reached"


def _killed_in_a_save(folder: Path, point: str, passing: int) -> bool:
    """Save step 3 behind the steps in a process of its own; whether it got through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fault_injection.arm([Fault(point=point, action="kill", first=passing, last=passing)])
            saver = CheckpointSaver(CheckpointStore(folder), CheckpointConfig(), is_writer=True)
            saver.save({"step": 3}, parts(3))
            saver.finish()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return True
    assert os.WTERMSIG(status) == signal.SIGKILL
    return False


@pytest.mark.reliability(6)
@pytest.mark.parametrize("point", [p for p in SAVE_POINTS if p != "checkpoint.copy"])
def test_a_call_that_fails_keeps_the_old_checkpoint_and_leaves_nothing_of_the_new(
    tmp_path: Path, point: str
) -> None:
    """ENOSPC at the n-th passing of the point, for every n, until a save gets through."""
    for passing in itertools.count(1):
        store = CheckpointStore(tmp_path / str(passing))
        for step in (1, 2):
            save(store, step)
        fault_injection.arm(parse(f"{point} pass={passing} raise:ENOSPC"))
        problem = None
        try:
            save(store, 3)
        except OSError as error:
            problem = error
        finally:
            fault_injection.arm([])
        if problem is not None:
            assert problem.errno == errno.ENOSPC
            if point in ("checkpoint.write", "checkpoint.sync"):
                assert problem.filename is not None
                assert Path(problem.filename).is_relative_to(store.directory)
        assert newest_step(store) in (2, 3)  # 3 only if the failure came after the rename
        assert not list(store.directory.glob(".writing-step*"))
        save(store, 4)
        assert newest_step(store) == 4
        if problem is None:
            break
    if point != "checkpoint.retire":  # costs space, not the checkpoint: it is only said
        assert passing > 1, "the point was not reached"


@pytest.mark.reliability(6)
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_of_the_new(
    tmp_path: Path,
) -> None:
    with small_tmpfs(tmp_path / "disk", 1 << 20) as disk:
        store = CheckpointStore(disk / "checkpoints")
        save(store, 1)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(store, 2)
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.filename).startswith(str(store.directory))
        assert exit_code_for(caught.value) == ExitCode.RETRYABLE
        assert newest_step(store) == 1
        assert not list(store.directory.glob(".writing-*"))
        filler.unlink()
        save(store, 2)
        assert newest_step(store) == 2
