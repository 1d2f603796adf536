"""A folder that appears whole under its name, or not at all."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.files.atomic_file import sync_folder


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which gets its name at the block's end.

    A folder that has the name goes, after the new one is there. After an error in the block the new
    one goes instead. A SIGKILL leaves ``.NAME.RANDOM.part``, which may be deleted. What is written
    in the block has to be durable by itself.

    No system call here replaces a folder that has files in it: for an instant the name is free, and
    a power cut then leaves the old one as ``.NAME.RANDOM.part.old``.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    folder.mkdir()
    try:
        yield folder
        old = folder.with_name(f"{folder.name}.old")
        replaces = path.exists()
        if replaces:
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if replaces:
                old.rename(path)
            raise
        sync_folder(path.parent)
        if replaces:
            shutil.rmtree(old)
    finally:
        if folder.exists():
            shutil.rmtree(folder)
