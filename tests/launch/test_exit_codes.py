"""Schedulers act on these numbers."""

import errno

import pytest

from data_pipeline.errors import DataError
from launch.exit_codes import ExitCode, exit_code_for, is_explained
from trainer.errors import CheckpointError, ConfigError, NumericalError, RankLostError


def test_the_numbers_never_change() -> None:
    numbers = {code.name: code.value for code in ExitCode}
    assert numbers == {
        "DONE": 0,
        "FATAL": 1,
        "USAGE": 2,
        "RETRYABLE": 74,
        "PREEMPTED": 75,
        "INTERRUPTED": 130,
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


def test_a_defect_of_the_program_shows_its_traceback() -> None:
    assert not is_explained(AssertionError("x"))
    assert is_explained(ConfigError("x"))
