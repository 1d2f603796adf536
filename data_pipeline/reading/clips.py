"""Samples that are frames of clips, and tuples of frames that are drawn from them.

The manifest says where each clip begins and how far each frame differs from the one before. Where
that is far more than is usual in the clip, there is a cut, and no tuple lies across it; a frame
that differs by nothing repeats the one before, and is in no tuple.

Shapes: N samples, C clips, L frames that move, B tuples, F frames of a tuple.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import DataError
from common.randomness import Stream, sample_keys, uniforms
from data_pipeline.reading.order import IdArray, Weights
from data_pipeline.views import FrameDraw

_STILL = 0.1  # of 255 levels
_CUT = (12.0, 4.0)  # levels, and times the median of the clip's frames that move
_USUAL = 0.95  # share of frames whose motion counts in full; one flash is not to outweigh a film


class Clips:
    """Clips of a set.

    Args:
        starts_C: int64 ids of the clips' first samples, ascending; a clip ends where the next one
            begins.
        motion_N: mean difference between each frame and the one before, in levels of 255.
    """

    def __init__(self, starts_C: IdArray, motion_N: Weights) -> None:
        begins_N = np.zeros(len(motion_N), bool)
        begins_N[starts_C] = True
        for clip in np.split(np.arange(len(motion_N)), starts_C[1:]):
            moving = motion_N[clip[1:]]
            median = np.median(moving[moving >= _STILL]) if (moving >= _STILL).any() else 0.0
            begins_N[clip[1:]] |= moving > max(_CUT[0], _CUT[1] * median)
        moves_N = begins_N | (motion_N >= _STILL)
        self._line_L = np.flatnonzero(moves_N)
        self._place_N = np.where(moves_N, np.cumsum(moves_N) - 1, -1)
        starts = np.flatnonzero(begins_N[self._line_L])
        shots_L = np.cumsum(begins_N[self._line_L]) - 1
        self._first_L = starts[shots_L]
        self._last_L = np.append(starts[1:], len(self._line_L))[shots_L] - 1
        self._motion_L = motion_N[self._line_L]

    def weights(self, draw: FrameDraw) -> Weights:
        """How often each sample is to be drawn from, float64 ``(N,)``: by the motion around it, 0
        where its clip leaves no room."""
        least = [gap[0] for gap in draw.gaps]
        place_L = np.arange(len(self._line_L))
        fits_L = place_L - self._first_L >= sum(least[: draw.sample])
        fits_L &= self._last_L - place_L >= sum(least[draw.sample :])
        reach = max(gap[1] for gap in draw.gaps[max(0, draw.sample - 1) : draw.sample + 1])
        # Of the differences after `before` and up to `end`.
        before_L = np.maximum(place_L - reach, self._first_L)
        end_L = np.minimum(place_L + reach, self._last_L)
        sums_L = np.cumsum(self._motion_L)
        around_L = (sums_L[end_L] - sums_L[before_L]) / np.maximum(end_L - before_L, 1)
        if fits_L.any():
            around_L = around_L.clip(max=np.quantile(around_L[fits_L], _USUAL))
        weights_N = np.zeros(len(self._place_N))
        weights_N[self._line_L[fits_L]] = around_L[fits_L]
        return weights_N

    def draw(
        self, draw: FrameDraw, seed: int, epoch: int, numbers_B: IdArray, ids_B: IdArray
    ) -> IdArray:
        """Samples of each tuple in the order of time, ``(B, F)``; a pure function of its arguments.

        Args:
            draw: how.
            seed: the run's.
            epoch: from 0.
            numbers_B: what tuples are drawn by.
            ids_B: samples that they are drawn about, whose weight is not 0.
        """
        place_B = self._place_N[ids_B]
        before = range(draw.sample - 1, -1, -1)
        after = range(draw.sample, len(draw.gaps))
        places = {draw.sample: place_B}
        for gaps, room_B, side in (
            (before, place_B - self._first_L[place_B], -1),
            (after, self._last_L[place_B] - place_B, 1),
        ):
            at_B, kept = place_B, sum(draw.gaps[gap][0] for gap in gaps)
            for gap in gaps:
                least, most = draw.gaps[gap]
                kept -= least  # for the frames further out
                most_B = np.minimum(most, room_B - kept)
                drawn_B = uniforms(sample_keys(seed, epoch, numbers_B, gap, Stream.FRAME), 0)
                step_B = least + (drawn_B * (most_B - least + 1)).astype(np.int64)
                at_B, room_B = at_B + side * step_B, room_B - step_B
                places[gap if side < 0 else gap + 1] = at_B
        return self._line_L[np.stack([places[frame] for frame in sorted(places)], -1)]


def read_clips(name: str, counts: Sequence[int], manifests: Sequence[dict[str, Any]]) -> Clips:
    """Clips of the files of a set, as their manifests name them.

    Args:
        name: of the set.
        counts: samples of each file.
        manifests: of each; empty where there is none.

    Raises:
        DataError: a file has none, or its manifest's do not fit it.
    """
    starts, motions, first = [], [], 0
    for count, manifest in zip(counts, manifests, strict=True):
        found = manifest.get("clips")
        if not isinstance(found, dict):
            raise DataError(
                f"{name}: frame order needs clips; pack folders of frames, or videos, with"
                " 'widebatch pack --clips'"
            )
        try:
            own_C = np.array(found["starts"], np.int64)
            motion = np.array(found["motion"], np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            own_C, motion = np.empty(0, np.int64), np.empty(0)
        fits = len(motion) == count and own_C.ndim == motion.ndim == 1
        if not (fits and len(own_C) and own_C[0] == 0 and (np.diff(own_C) > 0).all()):
            raise DataError(f"{name}: its manifest's clips do not fit its samples; pack again")
        if own_C[-1] >= count or not (np.isfinite(motion).all() and (motion >= 0).all()):
            raise DataError(f"{name}: its manifest's clips do not fit its samples; pack again")
        starts.append(own_C + first)
        motions.append(motion)
        first += count
    return Clips(np.concatenate(starts), np.concatenate(motions))
