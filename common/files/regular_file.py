"""Files to read, and nothing else that can have a name."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from common.errors import DataError


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading; links to one are followed.

    Raises:
        OSError: it is not there, or may not be read.
        DataError: a folder, a pipe or a device.
    """
    # Non-blocking, or a named pipe would wait here for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise DataError(f"{path}: not a regular file; put the file itself, or a link to it, there")
