"""Files of a run's folder, which only their owner reads: they name data and machines."""

import os
from pathlib import Path
from typing import TextIO


def open_to_append(path: Path) -> TextIO:
    """A text file, made with mode 0600 where there is none, at whose end is written.

    Raises:
        OSError: it cannot be written.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")
