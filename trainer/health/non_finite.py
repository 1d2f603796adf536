"""What happens when a step's numbers are lost: which samples it had, and when to give up.

The step itself is left out on all ranks by a decision on the device
(:func:`trainer.optim.optimizers. apply_update`). Precisions are bf16, fp32 and fp64, whose range
needs no loss scale, so there is none to lower or to save.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.bounds import check_bounds
from common.errors import NonFiniteError
from trainer.telemetry import JsonLines, Reader, Record

log = logging.getLogger(__name__)

FILE = "nonfinite.jsonl"
"""In a run's folder: of each step that was left out its loss, gradient norm and sample ids."""

_MOST_SHOWN = 8  # sample ids in a message


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do after `max_skipped_steps` steps in a row without finite gradients."""

    on_repeat: Literal["stop", "rollback"] = "stop"
    """stop: end the run, for a person to look at. rollback: go on from the newest checkpoint with
    the same samples, which mends what a fault of the machine has done and nothing else."""
    rollbacks: int = 1
    """So many times; then stop."""

    def __post_init__(self) -> None:
        check_bounds(self, "--guard.", rollbacks="[1, 1e9]")

    @property
    def budget(self) -> int:
        """Rollbacks that are allowed."""
        return self.rollbacks if self.on_repeat == "rollback" else 0


class NumericalGuard(Reader):
    """A reader of the step records, on every rank: all of them see the same numbers and agree.

    Args:
        max_skipped: steps in a row that end the run.
        sample_ids: of the global batch of a step, from 1.
        folder: of the run, on the rank that writes; ``None`` elsewhere.
        steps_done: by an earlier part of the run; the file's later lines are dropped.
    """

    def __init__(
        self,
        max_skipped: int,
        sample_ids: Callable[[int], Sequence[int]],
        folder: Path | None = None,
        steps_done: int = 0,
    ) -> None:
        self.max_skipped = max_skipped
        self.skipped_in_a_row = 0
        self._sample_ids = sample_ids
        self._lines = JsonLines(folder / FILE, steps_done) if folder else None

    def read(self, records: list[Record]) -> None:
        """Note steps that were left out for non-finite gradients, and count those in a row.

        Raises:
            NonFiniteError: ``max_skipped`` in a row.
        """
        for record in records:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0
            if record["skipped"]:
                self._note(record)
            if self.skipped_in_a_row >= self.max_skipped:
                raise NonFiniteError(
                    f"step {record['step']}: gradients were not finite in {self.skipped_in_a_row}"
                    f" steps in a row (loss {record['loss']}){self._blame(record['step'])}; lower"
                    " --optim.base-lr, or use --precision fp32. The newest checkpoint, where"
                    " there is one, is from before"
                )

    def _note(self, record: Record) -> None:
        if self._lines is None:
            return
        line = {
            "step": record["step"],
            # As text: JSON has no word for what is not finite.
            "loss": str(record["loss"]),
            "gradient_norm": str(record.get("gradient_norm")),
            "ids": list(self._sample_ids(record["step"])),
        }
        self._lines.read([line])
        if self.skipped_in_a_row == 1:
            log.warning(
                "step %d: gradients were not finite, the step was left out; %s names its samples",
                record["step"],
                self._lines.path,
            )

    def _blame(self, step: int) -> str:
        ids = self._sample_ids(step)
        more = f" and {len(ids) - _MOST_SHOWN} more" if len(ids) > _MOST_SHOWN else ""
        return f" on samples {', '.join(map(str, ids[:_MOST_SHOWN]))}{more}: see {FILE}"

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
