"""How many damaged samples a run has replaced, on all ranks together, and which."""

import logging
from pathlib import Path

from common.collectives import all_gather_json, broadcast_json
from common.errors import DataError
from common.files.strict_json import parse_json
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.damage import Damage
from data_pipeline.reading.loader import TrainLoader
from trainer.telemetry import JsonLines, Reader, Record

log = logging.getLogger(__name__)

FILE = "substitutes.jsonl"
"""In a run's folder: step, damaged sample, the sample shown in its place, and what was wrong."""


class SubstituteLog(Reader):
    """Counts damaged samples, writes their numbers to a file, and ends a run that has too many.

    Ranks exchange what they met whenever the step records are read, so that all of them end at the
    same step. What counts are different samples, over the whole run with its resumes.
    """

    def __init__(
        self,
        loader: TrainLoader,
        limit: float,
        folder: Path,
        *,
        writes: bool,
        steps_done: int,
    ) -> None:
        """A collective: rank 0 tells the others what an earlier part of the run has met.

        Args:
            loader: of the training data.
            limit: damaged samples that are allowed; below 1 a fraction of all.
            folder: the run's.
            writes: whether this rank writes the file; true on rank 0 alone.
            steps_done: of an earlier part of the run; the file's later lines are dropped.

        Raises:
            DataError: the earlier part met more than are allowed now.
        """
        self._loader = loader
        self._lines = JsonLines(folder / FILE, steps_done) if writes else None
        self._pending: list[tuple[int, int, int]] = []
        self._met: list[int] = []
        self._replaced = 0
        self._damage = Damage(loader.info.path, loader.num_samples, limit)
        for sample, fault in loader.damaged.items():
            self._damage.note(sample, fault)
        for sample in broadcast_json(self._met_before()):
            self._note(sample)
        if writes and loader.damaged:
            log.warning(
                "%s: %d samples are damaged in its tables; others are shown in their place",
                loader.info.path,
                len(loader.damaged),
            )

    def _met_before(self) -> list[int]:
        if self._lines is None or not self._lines.path.exists():
            return []
        path = self._lines.path
        try:
            lines = [parse_json(line) for line in path.read_bytes().splitlines()]
            found = sorted({int(line["sample"]) for line in lines})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: unreadable ({error}); delete it to go on") from None
        self._replaced = len(lines)
        return found

    def _note(self, sample: int) -> None:
        if sample not in self._damage.reasons:
            self._damage.note(sample, self._loader.problem(sample))

    def step(self, step: int, batch: Batch) -> None:
        """What this rank replaced in a step, from 1. Not a collective."""
        self._pending += [(step, each.sample, each.shown) for each in batch.substitutes]

    def complete(self, records: list[Record]) -> None:
        """Add ``substitutes``, a number over all ranks, to the steps' records. A collective."""
        found: list[list[list[int]]] = all_gather_json(self._pending)
        self._pending = []
        # Ranks hold consecutive parts of a batch: by step, the order is that of one process.
        rows = sorted((row for rows in found for row in rows), key=lambda row: row[0])
        for record in records:
            record["substitutes"] = sum(step == record["step"] for step, _, _ in rows)
        self._replaced += len(rows)
        self._met = [sample for _, sample, _ in rows]
        if rows and self._lines is not None:
            self._lines.read([self._line(*row) for row in rows])

    def _line(self, step: int, sample: int, shown: int) -> Record:
        why = self._damage.reasons.get(sample) or self._loader.problem(sample)
        return {"step": step, "sample": sample, "shown": shown, "why": why}

    def read(self, records: list[Record]) -> None:
        """Note what was met, on all ranks: the last of those that take the records.

        Raises:
            DataError: more samples are damaged than allowed; names file and samples.
        """
        for sample in self._met:
            self._note(sample)

    def close(self) -> None:
        """Say how many there were."""
        if self._lines is None:
            return
        self._lines.close()
        if self._damage.reasons:
            log.warning(
                "%s: %d damaged samples met; %d places in batches showed others instead (%s)",
                self._loader.info.path,
                len(self._damage.reasons),
                self._replaced,
                self._lines.path,
            )
