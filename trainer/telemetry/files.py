"""Readers that write files: JSON lines, and TensorBoard's events."""

import json
import os
from pathlib import Path
from typing import TextIO

from common.files.atomic_file import open_to_append
from common.files.strict_json import dump_json
from trainer.telemetry.stream import Reader, Record


class JsonLines(Reader):
    """A file with one JSON object a line, each of a step, which is made with its first line.

    Args:
        path: of the file.
        keep_up_to: step after which a resumed run repeats them; see :func:`keep_lines`.
    """

    def __init__(self, path: Path, keep_up_to: int) -> None:
        keep_lines(path, keep_up_to)
        self.path = path
        self._file: TextIO | None = None

    def read(self, records: list[Record]) -> None:
        """Append the records."""
        self._file = self._file or open_to_append(self.path)
        for record in records:
            self._file.write(dump_json(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def keep_lines(path: Path, last_step: int) -> None:
    """Drop lines of steps after ``last_step``, and a torn last line, that a resumed run repeats.

    The file is cut off where it is: with the ids of every step it may be larger than the memory.
    """
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return
    with file:
        os.fchmod(file.fileno(), 0o600)
        kept, newest = 0, b"\n"
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break  # a process was killed while it wrote this line; what follows is repeated
            if record.get("step", 0) > last_step:
                break
            kept, newest = kept + len(line), line
        file.truncate(kept)
        if not newest.endswith(b"\n"):
            file.seek(kept)
            file.write(b"\n")


class TensorBoard(Reader):
    """TensorBoard events; a resumed run hides what it repeats."""

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # TensorBoard takes names in UTF-8 alone, and an open folder has such a name on Linux.
        self._folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        name = str(directory)
        if name.encode("utf-8", "replace").decode() != name:
            name = f"/proc/self/fd/{self._folder}"
        self._writer = SummaryWriter(name, purge_step=done + 1 if done else None)
        for events in directory.glob("events.*"):
            events.chmod(0o600)

    def read(self, records: list[Record]) -> None:
        """Write every number of every record under its own name."""
        for record in records:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
        os.close(self._folder)
