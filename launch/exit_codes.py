"""What a process says when it ends, in one number.

Schedulers and wrappers decide on it: a preempted or retryable run may be started again with the
same command and goes on from its last checkpoint; a fatal one must not be.
"""

import errno
from enum import IntEnum

from common.errors import ExplainedError, InputError, RankLostError


class ExitCode(IntEnum):
    """Exit status of every ``widebatch`` command."""

    DONE = 0
    FATAL = 1
    """A defect of the program or a run that cannot go on: starting it again will not help."""
    USAGE = 2
    """Wrong arguments or bad input: the message says what to change."""
    RETRYABLE = 74
    """The surroundings failed (disk full, a process lost): the same command may succeed later."""
    PREEMPTED = 75
    """Stopped by a signal, with a checkpoint unless no step was made: the same command goes on."""
    INTERRUPTED = 130
    """Ctrl-C in a command that keeps no checkpoint."""
    UNREAD = 141
    """Whoever read the output has gone, as after a signal for that."""


_RETRYABLE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET}
)
_USER_OS_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def exit_code_for(error: BaseException) -> ExitCode:
    """The exit status that an uncaught exception ends the process with."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, (InputError, *_USER_OS_ERRORS, PermissionError)):
        return ExitCode.USAGE
    if isinstance(error, RankLostError):
        return ExitCode.RETRYABLE
    if isinstance(error, OSError) and error.errno in _RETRYABLE_ERRNOS:
        return ExitCode.RETRYABLE
    return ExitCode.FATAL


def is_explained(error: BaseException) -> bool:
    """Whether the message of ``error`` alone tells a user what to do, without a traceback."""
    return isinstance(error, (ExplainedError, OSError, KeyboardInterrupt))
