"""Files that are written: whole under their name or not at all, or line by line at their end."""

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import BinaryIO, TextIO

_WHY_NOT = {
    errno.EACCES: "this user may not write here; choose another folder",
    errno.EROFS: "read-only; choose another folder",
    errno.ENOENT: "no such folder; make it first",
}

_DEVICES = Path("/dev")


class AtomicFile:
    """Written under no name (or a temporary one), then given its name in one step.

    Where the file system knows unnamed files (O_TMPFILE: ext4, xfs, btrfs, tmpfs), not even a
    SIGKILL leaves anything behind. Elsewhere (NFS, Lustre) the temporary ``.NAME.RANDOM.part`` in
    the same folder is deleted on every way out but SIGKILL and a power cut.

    ``with AtomicFile(path) as atomic: atomic.file.write(...); atomic.publish()``; without
    ``publish`` the file is gone at the block's end. The access mode follows the umask.

    Raises:
        OSError: there is no writing in the folder, or :func:`check_replaceable` refuses the name.
    """

    def __init__(self, path: Path) -> None:
        check_replaceable(path)
        self._path = path
        self._temporary: Path | None = None
        folder = path.parent
        descriptor = _open_unnamed(folder)
        if descriptor is None:
            self._temporary = self._temporary_name()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                descriptor = os.open(self._temporary, flags, 0o666)
            except OSError as error:  # which would name a file that nobody knows
                why = _WHY_NOT.get(error.errno or 0, error.strerror)
                raise type(error)(error.errno, why, str(folder)) from error
        self.file: BinaryIO = os.fdopen(descriptor, "w+b", buffering=1 << 20)

    def _temporary_name(self) -> Path:
        return self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}.part")

    def stage(self) -> None:
        """Make the content durable and give it a temporary name; only a rename is left to do."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self._temporary is None:
            name = self._temporary_name()
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # With a folder descriptor Python calls linkat(AT_SYMLINK_FOLLOW), which is what
                # turns the /proc link into a name for the unnamed file.
                source = f"/proc/self/fd/{self.file.fileno()}"
                os.link(source, name.name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(folder)
            self._temporary = name

    def publish(self) -> None:
        """Give the file its name, replacing what had it, durably."""
        self.stage()
        assert self._temporary is not None  # noqa: S101  (stage names it)
        self._temporary.replace(self._path)
        self._temporary = None
        sync_folder(self._path.parent)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Name first: closing flushes, which fails again on a full disk.
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                self._temporary.unlink()
        try:
            self.file.close()
        except OSError:
            if kind is None:  # else what is raised is the one to tell
                raise


def check_replaceable(path: Path, suffix: str = "") -> None:
    """Refuse a name that something has which is not written by giving its name away.

    Of a link to a regular file, or to nothing, the link is replaced and the file stands.

    Args:
        path: the name.
        suffix: of what is written; a file that is there is replaced if its name ends so.

    Raises:
        FileExistsError: a folder, device, pipe or socket has the name, or a link to one; or it is
            in /dev, where ``stdout`` may be a link to a file; or a file of another kind has it.
    """
    if path.absolute().parent == _DEVICES or (path.exists() and not path.is_file()):
        what = "is a folder" if path.is_dir() else "is no regular file, and is not replaced"
        raise FileExistsError(f"{path}: {what}; choose another name")
    if path.exists() and not path.name.lower().endswith(suffix):
        raise FileExistsError(f"{path}: exists and is no {suffix} file; choose another name")


def write_atomically(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write or replace a file: whole, durably, or not at all.

    Args:
        path: its folder is there.
        content: all of it.
        private: for its owner alone, whatever the umask.

    Raises:
        OSError: it could not be written; what had the name stands.
    """
    with AtomicFile(path) as atomic:
        if private:
            os.fchmod(atomic.file.fileno(), 0o600)
        atomic.file.write(content)
        atomic.publish()


def open_to_append(path: Path) -> TextIO:
    """A text file for its owner alone, made where there is none, at whose end is written.

    Raises:
        OSError: it cannot be written.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")


def as_utf8(text: str) -> bytes:
    r"""Text for a person as UTF-8; what a file's name has that is none becomes ``\udce9``."""
    return text.encode(errors="backslashreplace")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: it is none, or the disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_unnamed(folder: Path) -> int | None:
    """A descriptor without a name in ``folder``; None where that is not possible."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except (OSError, AttributeError):  # the file system or the platform does not know it
        return None
    if not Path(f"/proc/self/fd/{descriptor}").exists():  # no /proc: it could never get a name
        os.close(descriptor)
        return None
    return descriptor
