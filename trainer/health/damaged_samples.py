"""How many damaged samples a run has replaced, on all ranks together, and which."""

import logging
from pathlib import Path

from common.collectives import all_gather_json, broadcast_json
from common.errors import DataError
from common.files.strict_json import parse_json
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.damage import Damage
from data_pipeline.reading.open_data import OpenData
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
        data: OpenData,
        folder: Path,
        *,
        writes: bool,
        steps_done: int,
    ) -> None:
        """A collective: rank 0, which alone ``writes``, tells what an earlier part of the run met.

        The file's lines after ``steps_done`` are dropped.

        Raises:
            DataError: the earlier part met more than are allowed now.
        """
        self._data = data
        self._lines = JsonLines(folder / FILE, steps_done) if writes else None
        self._pending: list[tuple[int, int, int, str]] = []
        self._met: list[tuple[int, str]] = []
        self._replaced = 0
        self._damage = Damage(data.info.name, data.info.num_samples, data.max_damaged)
        for sample, why in (*data.table.damaged.items(), *broadcast_json(self._met_before())):
            self._damage.note(sample, why)
        if writes and data.table.damaged:
            log.warning(
                "%s: %d samples are damaged in its tables; others are shown in their place",
                data.info.name,
                len(data.table.damaged),
            )

    def _met_before(self) -> list[tuple[int, str]]:
        if self._lines is None or not self._lines.path.exists():
            return []
        path = self._lines.path
        try:
            lines = [parse_json(line) for line in path.read_bytes().splitlines()]
            found = sorted({int(line["sample"]): str(line["why"]) for line in lines}.items())
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: unreadable ({error}); delete it to go on") from None
        self._replaced = len(lines)
        return found

    def step(self, step: int, batch: Batch) -> None:
        """What this rank replaced in a step, from 1. Not a collective."""
        self._pending += [(step, each.sample, each.shown, each.why) for each in batch.substitutes]

    def complete(self, records: list[Record]) -> None:
        """Add ``substitutes``, a number over all ranks, to the steps' records. A collective."""
        found: list[list[tuple[int, int, int, str]]] = all_gather_json(self._pending)
        self._pending = []
        # Ranks hold consecutive parts of a batch: by step, the order is that of one process.
        rows = sorted((row for rows in found for row in rows), key=lambda row: row[0])
        for record in records:
            record["substitutes"] = sum(step == record["step"] for step, *_ in rows)
        self._replaced += len(rows)
        self._met = [(sample, why) for _, sample, _, why in rows]
        if rows and self._lines is not None:
            names = ("step", "sample", "shown", "why")
            self._lines.read([dict(zip(names, row)) for row in rows])

    def read(self, records: list[Record]) -> None:
        """Note what was met, on all ranks: the last of those that take the records.

        Raises:
            DataError: more samples are damaged than allowed; names file and samples.
        """
        for sample, why in self._met:
            if self._lines is not None and sample not in self._damage.reasons:
                log.warning("%s %s; another is shown", self._data.place(sample), why)
            self._damage.note(sample, why)

    def close(self) -> None:
        """Say how many there were."""
        if self._lines is None:
            return
        self._lines.close()
        if self._damage.reasons:
            log.warning(
                "%s: %d damaged samples met; %d places in batches showed others instead (%s)",
                self._data.info.name,
                len(self._damage.reasons),
                self._replaced,
                self._lines.path,
            )
