"""Another sample in the place of a damaged one: a pure function of (seed, epoch, sample id).

Which sample stands in is drawn from the counter generator, keyed by the damaged sample, so it is
the same on any number of processes and after any resume. The substitute is cropped and augmented
under the damaged sample's number: where it is in the batch itself too, the two show other views.

Shape suffixes: N samples, V views of a group, S side of a view, 4 = (top, left, height, width).
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.randomness import Stream, sample_keys, uniforms
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import IdArray

BoxArray = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

# A file within its budget is nearly all sound: so many draws fail only where the budget is wide.
_ATTEMPTS = 32

_REMEDY = "pack it again with 'widebatch pack', which leaves damaged images out and lists them"


class Cut(NamedTuple):
    """Views of one size to be cut out of each sample, and where they go."""

    boxes_NV4: BoxArray  # noqa: N815
    out_NVSS3: Pixels  # noqa: N815

    def one_by_one(self) -> "Cut":
        """The same of N * V samples with one view each."""
        side = self.out_NVSS3.shape[2]
        return Cut(self.boxes_NV4.reshape(-1, 1, 4), self.out_NVSS3.reshape(-1, 1, side, side, 3))


Cuts = tuple[Cut, ...]
"""Of groups of views of different sizes, from one decode."""


def cuts_of(cuts: Cuts, part: slice) -> Cuts:
    """Those of some of the samples."""
    return tuple(Cut(cut.boxes_NV4[part], cut.out_NVSS3[part]) for cut in cuts)


@dataclass(frozen=True)
class Substitute:
    """One damaged sample of a batch, which sample its place shows, and what is wrong with it."""

    sample: int
    shown: int
    why: str
    """To be put after 'sample 5'."""


class Decoder(abc.ABC):
    """What a backend does: decode samples of a set, cut boxes out of them, say what failed.

    Safe to call from several threads.

    Args:
        data: whose samples these are.
    """

    def __init__(self, data: OpenData) -> None:
        self._data = data
        self._problems: dict[int, str] = {}

    @abc.abstractmethod
    def try_decode(self, ids_N: IdArray, cuts: Cuts) -> IdArray:
        """Decode each sample once, and fill every cut's pixels with its boxes, resized to S x S.

        Returns:
            Places in ``ids_N`` of the samples that do not decode, ascending; what is cut there
            means nothing.
        """

    @abc.abstractmethod
    def why(self, sample: int) -> str:
        """What decoding says of a damaged sample that the tables have nothing against."""

    def problem(self, sample: int) -> str:
        """What is wrong with a damaged sample, to be put after 'sample 5'."""
        if sample not in self._problems:
            of_tables = self._data.table.damaged.get(sample)
            self._problems[sample] = of_tables or f"does not decode ({self.why(sample)})"
        return self._problems[sample]

    def said(self, sample: int) -> str:
        """Which sample of which file is damaged, and how."""
        return f"{self._data.place(sample)} {self.problem(sample)}"

    def decode(self, ids_N: IdArray, cuts: Cuts) -> None:
        """As :meth:`try_decode`, for files that must be sound.

        Raises:
            DataError: a sample does not decode; names the first.
        """
        failed = self.try_decode(ids_N, cuts)
        if failed.size:
            sample = int(ids_N[failed[0]])
            raise DataError(f"{self.said(sample)}; {_REMEDY}")


def candidates(seed: int, epoch: int, sample: int, num_samples: int) -> IdArray:
    """Samples to show in the place of a damaged one, in the order in which they are tried."""
    keys = sample_keys(seed, epoch, sample, 0, Stream.SUBSTITUTE)
    drawn = uniforms(np.broadcast_to(keys, _ATTEMPTS), np.arange(_ATTEMPTS))
    return (drawn * num_samples).astype(np.int64)


def decode_or_substitute(
    decoder: Decoder,
    ids_N: IdArray,
    cuts: Cuts,
    *,
    boxes_of: Callable[[slice, IdArray], Sequence[BoxArray]],
    seed: int,
    epoch: int,
    num_samples: int,
) -> list[Substitute]:
    """As :meth:`Decoder.try_decode`, but a damaged sample's place shows another sample.

    ``boxes_of`` takes places in ``ids_N`` and the ids of the samples shown there, and gives the
    boxes of every cut. Returns what was replaced, in the order of ``ids_N``.

    Raises:
        DataError: none of a sample's substitutes decodes either; names them.
    """
    replaced = []
    for place in decoder.try_decode(ids_N, cuts).tolist():
        places, sample = slice(place, place + 1), int(ids_N[place])
        tried = candidates(seed, epoch, sample, num_samples)
        for shown in tried[:, None]:
            boxes = boxes_of(places, shown)
            again = tuple(
                cut._replace(boxes_NV4=box) for cut, box in zip(cuts_of(cuts, places), boxes)
            )
            if not decoder.try_decode(shown, again).size:
                replaced.append(Substitute(sample, int(shown[0]), decoder.problem(sample)))
                break
        else:
            raise DataError(
                f"{decoder.said(sample)}; the samples tried in its place are damaged too:"
                f" {np.unique(tried).tolist()}; {_REMEDY}"
            )
    return replaced
