"""Which images each step saw: the evidence behind "the same run"."""

from pathlib import Path

import torch

from common.collectives import all_gather_rows
from common.files.private_file import open_to_append
from common.files.strict_json import dump_json
from trainer.telemetry import keep_lines


class SampleLog:
    """``samples.jsonl``: per step the sample ids that the ranks really had, in global order."""

    def __init__(self, path: Path | None, keep_up_to: int) -> None:
        """``path`` on the rank that writes, ``None`` elsewhere."""
        self._file = None
        if path is not None:
            keep_lines(path, keep_up_to)
            self._file = open_to_append(path)

    def step(self, step: int, ids_B: torch.Tensor, device: torch.device) -> None:
        """Gather the ranks' ids and write them. A collective, and a host synchronisation."""
        ids = all_gather_rows(ids_B.to(device)).tolist()
        if self._file is not None:
            self._file.write(dump_json({"step": step, "ids": ids}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
