"""The damaged samples of a set: which they are, why, and how many a caller puts up with.

A packed file that lost some bytes need not end a run of weeks. Where a caller allows it, another
sample is shown in the place of one that cannot be read
(:mod:`data_pipeline.reading.substitutes`), batches say so, and whoever reads them notes it here.
More of them than allowed are an error that names them.
"""

import math

import numpy as np
import numpy.typing as npt

from common.errors import DataError

_NAMED = 20  # damaged samples that an error message lists


def allowance(limit: float, num_samples: int) -> int:
    """How many samples ``limit`` is: below 1 a fraction of ``num_samples``, rounded up."""
    return math.ceil(limit * num_samples) if limit < 1 else int(limit)


def check_limit(limit: float, setting: str) -> None:
    """Refuse a limit for :func:`allowance` that means nothing.

    Raises:
        DataError: negative, not finite, or a count with a fraction; names ``setting``.
    """
    if not (math.isfinite(limit) and limit >= 0 and (limit < 1 or limit == int(limit))):
        raise DataError(
            f"{setting} must be a fraction of the samples (below 1) or a whole number, got {limit}"
        )


class Damage:
    """Samples of a set that cannot be read.

    Args:
        name: of its files, for messages.
        num_samples: in it.
        limit: how many may be damaged, see :func:`allowance`.

    Attributes:
        allowed: the limit as a number of samples.
        reasons: sample id -> what is wrong with it, in words.
    """

    def __init__(self, name: str, num_samples: int, limit: float = 0) -> None:
        self.name, self.num_samples = name, num_samples
        self.allowed = allowance(limit, num_samples)
        self.reasons: dict[int, str] = {}

    def mark(self, bad_N: npt.NDArray[np.bool_], what: str) -> None:
        """Note the samples where ``bad_N`` is set, unless something is known of them already.

        Args:
            bad_N: bool (N,) over all samples of the set.
            what: after 'sample 5 ', such as 'has no image data'.

        Raises:
            DataError: these are more than allowed.
        """
        ids = np.flatnonzero(bad_N)
        if ids.size > self.allowed + len(self.reasons):  # not one by one: they may be millions
            ids = ids[: self.allowed + len(self.reasons) + 1]
        for sample in ids.tolist():
            self.note(sample, what)

    def note(self, sample: int, what: str) -> None:
        """Note one sample, unless something is known of it already.

        Raises:
            DataError: it is one more than allowed.
        """
        if sample in self.reasons:
            return
        self.reasons[sample] = what
        if len(self.reasons) > self.allowed:
            raise self._error()

    def sound(self) -> npt.NDArray[np.bool_]:
        """Bool (N,): set where nothing is known to be wrong."""
        sound_N = np.ones(self.num_samples, bool)
        sound_N[list(self.reasons)] = False
        return sound_N

    def _error(self) -> DataError:
        first, what = next(iter(self.reasons.items()))
        remedy = "pack it again with 'widebatch pack'"
        if not self.allowed:
            return DataError(f"{self.name}: sample {first} {what}; {remedy}")
        named = ", ".join(str(sample) for sample in sorted(self.reasons)[:_NAMED])
        more = ", ..." if len(self.reasons) > _NAMED else ""
        return DataError(
            f"{self.name}: at least {len(self.reasons)} samples are damaged, {self.allowed} may "
            f"be: {named}{more} (sample {first} {what}); {remedy}, which leaves damaged images out,"
            " or raise --data.max-substitutes"
        )
