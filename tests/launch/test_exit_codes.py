"""Schedulers act on these numbers."""

import errno
from typing import NoReturn

import pytest

from common.errors import CheckpointError, ConfigError, DataError, NumericalError, RankLostError
from launch import command_line
from launch.__main__ import main
from launch.exit_codes import ExitCode, exit_code_for, is_explained


def test_the_numbers_never_change() -> None:
    numbers = {code.name: code.value for code in ExitCode}
    assert numbers == {
        "DONE": 0,
        "FATAL": 1,
        "USAGE": 2,
        "RETRYABLE": 74,
        "PREEMPTED": 75,
        "INTERRUPTED": 130,
        "UNREAD": 141,
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), ExitCode.USAGE),
        (DataError("x"), ExitCode.USAGE),
        (CheckpointError("x"), ExitCode.USAGE),
        (FileNotFoundError(errno.ENOENT, "x"), ExitCode.USAGE),
        (PermissionError(errno.EACCES, "x"), ExitCode.USAGE),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.RETRYABLE),
        (NumericalError("x"), ExitCode.FATAL),
        (RankLostError("x"), ExitCode.RETRYABLE),
        (AssertionError("x"), ExitCode.FATAL),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
)
def test_every_error_has_its_code(error: BaseException, code: ExitCode) -> None:
    assert exit_code_for(error) is code


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--verbose", "pretrain", "simclr-r50", "--devices", "2"], ExitCode.PREEMPTED),
        (["evaluate", "knn", "pretrain"], ExitCode.INTERRUPTED),
    ],
)
@pytest.mark.parametrize("where", ["run", "_check_packages"])
def test_ctrl_c_before_a_command_has_begun_has_the_commands_code(
    words: list[str],
    code: ExitCode,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, where, interrupt)
    assert main(words) == code
    assert capfd.readouterr().err == "interrupted\n"


def test_a_defect_of_the_program_shows_its_traceback() -> None:
    assert not is_explained(AssertionError("x"))
    assert is_explained(ConfigError("x"))
