"""Stops a run whose numbers are gone, with the place named."""

from trainer.errors import NumericalError
from trainer.telemetry import Record


class NumericalGuard:
    """A reader of the step records, on every rank: all of them see the same numbers and agree."""

    def __init__(self, max_skipped: int, skipped_in_a_row: int = 0) -> None:
        self.max_skipped = max_skipped
        self.skipped_in_a_row = skipped_in_a_row

    def read(self, records: list[Record]) -> None:
        """Count steps that were left out for non-finite gradients.

        Raises:
            NumericalError: ``max_skipped`` in a row.
        """
        for record in records:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0
            if self.skipped_in_a_row >= self.max_skipped:
                raise NumericalError(
                    f"step {record['step']}: gradients were not finite in {self.skipped_in_a_row}"
                    f" steps in a row (loss {record['loss']}); lower --optim.base-lr, or use"
                    " --precision fp32. The newest checkpoint is from before"
                )

    def close(self) -> None:
        """Nothing to close."""
