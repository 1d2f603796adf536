"""A run holds its folder, and trains where the file system has no locks to hold it by."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from trainer.doctor.folder import shared_folder
from trainer.errors import ConfigError
from trainer.run_folder import exclusive


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
