"""Readers that write files: metrics.jsonl, and TensorBoard's events."""

import json
import os
from pathlib import Path

from trainer.telemetry.stream import Record


class JsonLines:
    """``metrics.jsonl``: one object a line, flushed with every reading."""

    def __init__(self, path: Path, keep_up_to: int) -> None:
        keep_lines(path, keep_up_to)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")

    def read(self, records: list[Record]) -> None:
        """Append the records."""
        for record in records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def keep_lines(path: Path, last_step: int) -> None:
    """Drop lines of steps after ``last_step``, and a torn last line, that a resumed run repeats."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # a process was killed while it wrote this line; what follows is repeated
        if record.get("step", 0) > last_step:
            break
        kept.append(line + "\n")
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text("".join(kept))
    temporary.chmod(0o600)
    temporary.replace(path)


class TensorBoard:
    """TensorBoard events; a resumed run hides what it repeats."""

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(directory), purge_step=done + 1 if done else None)
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
