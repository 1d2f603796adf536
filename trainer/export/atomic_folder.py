"""A folder that appears whole under its name, or not at all."""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from common.files.atomic_file import sync_folder


class AtomicFolder:
    """Filled under a temporary name beside it, then renamed.

    ``with AtomicFolder(path) as atomic: atomic.write(files); atomic.publish()``; without
    ``publish`` it is gone at the block's end. A SIGKILL leaves ``.NAME.RANDOM.part``, which may be
    deleted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        """Where the files are until then."""
        self.folder.mkdir()

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files by name, durably."""
        for name, content in files.items():
            with (self.folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(self.folder)

    def publish(self) -> None:
        """Give the folder its name; one that has it goes, after the new one is there.

        No system call here replaces a folder that has files in it: for an instant the name is
        free, and a power cut then leaves the old one as ``.NAME.RANDOM.part.old``.
        """
        old = self.folder.with_name(f"{self.folder.name}.old")
        replaces = self._path.exists()
        if replaces:
            self._path.rename(old)
        try:
            self.folder.rename(self._path)
        except OSError:
            if replaces:
                old.rename(self._path)
            raise
        sync_folder(self._path.parent)
        if replaces:
            shutil.rmtree(old)

    def __enter__(self) -> "AtomicFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
