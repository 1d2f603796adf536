"""A run holds its folder, and trains where the file system has no locks to hold it by."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from common.errors import ConfigError
from trainer.doctor.folder import shared_folder
from trainer.state.run_folder import exclusive


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As NFS without its lock service and Lustre without the option do."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(ConfigError, match="another process is training there"),
        exclusive(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("before", [[], ["notes.txt"], ["config.json", "heartbeats/x"]], ids=str)
def test_a_run_that_did_not_begin_leaves_what_was_there_before(
    before: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    for name in before:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    with contextlib.suppress(ConfigError), exclusive(run):
        for name in ("heartbeats", "stacks"):
            (run / name).mkdir(exist_ok=True)
            (run / name / "rank-00000").touch()
        raise ConfigError
    left = [str(p.relative_to(run)) for p in tmp_path.rglob("*") if p.is_file()]
    assert set(before) == set(left) if "config.json" not in before else set(before) < set(left)
    assert (tmp_path / "runs").exists() == bool(before)


def test_a_lock_that_was_cleared_away_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is refused clears its folder between another one's opening and its locking."""
    lock = fcntl.flock

    def cleared(descriptor: int, operation: int) -> None:
        (tmp_path / "run" / ".lock").unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", cleared)
    with pytest.raises(ConfigError, match="has just left it"), exclusive(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_warned_of_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch, number)
    with exclusive(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    (warning,) = caplog.messages
    assert f"--out {tmp_path / 'run'}: no file locks there" in warning
    (found,) = (each for each in shared_folder(tmp_path) if each.check == "locks")
    assert found.verdict == "note"
    assert found.said.startswith("this file system has no file locks")


def test_other_troubles_with_the_lock_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path / "run"):
        pass


def test_locks_that_hold_are_no_finding(tmp_path: Path) -> None:
    assert {each.check for each in shared_folder(tmp_path)} == {"folder", "disk"}
