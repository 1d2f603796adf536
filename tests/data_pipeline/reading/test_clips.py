"""Tuples of frames: in order, of one shot, of frames that move, drawn by counters."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data_pipeline.crops import CropConfig, frame_boxes
from data_pipeline.reading.clips import Clips, read_clips
from data_pipeline.reading.loader import EvalLoader, TrainLoader
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import FrameDraw, ViewGroup, decodes, views_of_one_size
from tests.data_pipeline.damaged import changed as changed_tables
from tests.data_pipeline.damaged import empty
from tests.data_pipeline.packed import packed

FIVE = FrameDraw(((2, 4), (1, 3), (1, 3), (2, 4)), 2)
FOUR = FrameDraw(((1, 5),) * 3, 1)


def clips(lengths: list[int], motion: dict[int, float] | None = None) -> Clips:
    """Clips of frames that differ by 10 each from the one before, but where said otherwise."""
    motion_N = np.full(sum(lengths), 10.0)
    starts = np.cumsum([0, *lengths[:-1]])
    motion_N[starts] = 0
    for frame, value in (motion or {}).items():
        motion_N[frame] = value
    return Clips(starts, motion_N)


def drawn(found: Clips, draw: FrameDraw, epochs: int = 30) -> np.ndarray:
    """Tuples about every sample that has a weight."""
    ids = np.flatnonzero(found.weights(draw))
    return np.concatenate([found.draw(draw, 3, epoch, ids, ids) for epoch in range(epochs)])


@pytest.mark.parametrize("draw", [FIVE, FOUR])
def test_a_tuple_lies_in_one_clip_in_order_with_the_gaps_asked_for(draw: FrameDraw) -> None:
    lengths = [6, 7, 8, 30, 3, 100]
    found = drawn(clips(lengths), draw)
    ends = np.cumsum(lengths)
    which = np.searchsorted(ends, found, side="right")
    assert (which == which[:, :1]).all()
    long_enough = {clip for clip, length in enumerate(lengths) if length >= draw.length}
    assert set(which[:, 0].tolist()) == long_enough
    gaps = np.diff(found, axis=1)
    for gap, (least, most) in zip(gaps.T, draw.gaps):
        assert set(gap.tolist()) == set(range(least, most + 1))


def test_a_sample_is_the_frame_that_it_is_said_to_be() -> None:
    found, ids = clips([40]), np.arange(10, 30)
    for draw in (FIVE, FOUR):
        assert np.array_equal(found.draw(draw, 0, 0, ids, ids)[:, draw.sample], ids)


def test_every_sample_that_has_room_has_a_weight_and_no_other() -> None:
    weights = clips([6, 7, 9]).weights(FIVE)
    # Three frames before it and three after: none of six, one of seven, three of nine.
    assert np.flatnonzero(weights).tolist() == [9, 16, 17, 18]


def test_no_tuple_lies_across_a_cut() -> None:
    found = drawn(clips([60], {30: 100.0}), FIVE)
    assert ((found < 30).all(1) | (found >= 30).all(1)).all()
    assert {30, 29} <= set(found.ravel().tolist())


def test_a_lively_clip_has_no_cuts() -> None:
    assert clips([60], dict.fromkeys(range(1, 60), 45.0)).weights(FIVE).astype(bool).sum() == 54


def test_frames_that_repeat_the_one_before_are_in_no_tuple() -> None:
    still = dict.fromkeys(range(10, 20), 0.0)
    found = drawn(clips([40], still), FOUR)
    assert not set(found.ravel().tolist()) & set(still)
    # The gap is counted in frames that move.
    assert (np.diff(found, axis=1) > 10).any()
    places = np.where(found < 10, found, found - 10)
    assert np.diff(places, axis=1).max() == 5


def test_frames_are_drawn_about_as_often_as_there_is_motion() -> None:
    motion = {frame: 2.0 if frame < 200 else 4.0 for frame in range(1, 400)}
    motion[300] = 4000.0  # a flash: a cut, and no weight of its own
    weights = clips([400], motion).weights(FIVE)
    assert weights[50] == pytest.approx(2)
    assert weights[250] == pytest.approx(4)
    assert weights.max() == pytest.approx(4)


def test_numbers_and_epochs_draw_other_tuples_about_a_sample() -> None:
    found, ids = clips([200]), np.full(300, 100)
    by_number = found.draw(FIVE, 0, 0, np.arange(300), ids)
    by_epoch = [found.draw(FIVE, 0, epoch, ids[:1], ids[:1]) for epoch in range(100)]
    for tuples in (by_number, np.concatenate(by_epoch)):
        assert len(np.unique(tuples, axis=0)) > 50
    assert np.array_equal(by_number[200:], found.draw(FIVE, 0, 0, np.arange(200, 300), ids[:100]))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"starts": [0]},
        {"starts": [], "motion": [0.0] * 4},
        {"starts": [1], "motion": [0.0] * 4},
        {"starts": [0, 4], "motion": [0.0] * 4},
        {"starts": [0, 2, 2], "motion": [0.0] * 4},
        {"starts": [0], "motion": [0.0] * 5},
        {"starts": [0], "motion": [0.0, 0, 0, -1]},
        {"starts": [0], "motion": [0.0, 0, 0, float("nan")]},
        {"starts": [[0]], "motion": [0.0] * 4},
        {"starts": "0", "motion": [0.0] * 4},
        {"starts": [0], "motion": [{}] * 4},
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match="set: its manifest's clips do not fit its samples; pack"):
        read_clips("set", [4], [{"clips": wrong}])


def test_a_set_without_clips_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"set: frame order needs clips; .* 'widebatch pack"):
        read_clips("set", [4, 4], [{"clips": {"starts": [0], "motion": [0.0] * 4}}, {}])


def test_frames_are_cut_alike_but_for_a_small_shift() -> None:
    numbers, sides = np.arange(500), np.full((500, 4), 100)
    crop = CropConfig(size=32, scale=(0.2, 0.5))
    boxes = frame_boxes(5, 1, numbers, sides, sides, crop, 0.1)
    still = frame_boxes(5, 1, numbers, sides, sides, crop, 0.0)
    assert (still == still[:, :1]).all()
    assert (boxes[..., 2:] == still[..., 2:]).all()
    moved = np.abs(boxes - still)[..., :2]
    assert (moved <= 0.1 * boxes[..., 2:] + 1).all()
    assert (moved.max((1, 2)) > 0).mean() > 0.9
    assert (boxes[..., :2] >= 0).all()
    assert (boxes[..., :2] + boxes[..., 2:] <= 100).all()
    smaller = frame_boxes(5, 1, numbers, sides // [1, 1, 4, 1], sides, crop, 0.1)
    assert (smaller[:, 2, 0] + smaller[:, 2, 2] <= 25).all()
    assert (smaller[..., 2:] > 0).all()


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "test.beton"
    packed("embedded:moving-digits:test", out)
    return out


def plan(draw: FrameDraw) -> ViewGroup:
    whole = CropConfig(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    looks = views_of_one_size(whole, len(draw.gaps) + 1)[0].looks
    return ViewGroup(whole, looks, frames=draw)


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_the_loader_shows_the_frames_drawn(moving: Path, backend: str) -> None:
    data, config = OpenData(moving), LoaderConfig(backend=backend, workers=2)  # type: ignore[arg-type]
    with closing(EvalLoader(data, 32, 32, config, batch_size=4320)) as whole:
        (images,) = whole
    group, pair = plan(FIVE), views_of_one_size(CropConfig(size=16), 2)
    views = (*pair, group, *pair)
    assert decodes(views) == 6
    with closing(TrainLoader(data, views, config, seed=4, batch_size=20)) as loader:
        batch = next(loader.starting_at(Position(0, 3)))
    ids, numbers = batch.ids_B.numpy(), batch.drawn_by_B.numpy()
    frames = data.clips.draw(FIVE, 4, 0, numbers, ids)
    assert np.array_equal(batch.crops[1].numpy(), images.crops_BVHWC[:, 0].numpy()[frames])
    assert np.array_equal(batch.labels_B.numpy(), data.table.labels[ids])
    assert data.clips.weights(FIVE)[ids].all()
    # What stands beside the frames is what would be there without them.
    with closing(
        TrainLoader(data, pair, config, seed=4, batch_size=20, order=loader.order)
    ) as alone:
        assert next(alone.starting_at(Position(0, 3))).crops[0].equal(batch.crops[0])


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_damaged_frame_alone_is_replaced(moving: Path, tmp_path: Path, backend: str) -> None:
    bad = changed_tables(moving, tmp_path / "bad.beton", empty(17))
    fields = json.loads(manifest_path(moving).read_text())
    clips_of_all = read_clips("set", [4320], [fields])
    ids = np.flatnonzero(clips_of_all.weights(FIVE))
    config = LoaderConfig(backend=backend, workers=1)  # type: ignore[arg-type]
    batches = {}
    for path, allowed in ((moving, 0), (bad, 1)):
        data = OpenData(path, allowed)
        data.__dict__["clips"] = clips_of_all  # a damaged file's manifest would be another file's
        with closing(TrainLoader(data, (plan(FIVE),), config, seed=1, batch_size=4320)) as loader:
            batches[path] = next(loader.starting_at(Position()))
    shown = clips_of_all.draw(
        FIVE, 1, 0, batches[bad].drawn_by_B.numpy(), batches[bad].ids_B.numpy()
    )
    assert len(ids) and (shown == 17).any()
    is_same = (batches[bad].crops[0] == batches[moving].crops[0]).flatten(2).all(2).numpy()
    assert np.array_equal(~is_same, shown == 17)
    assert {each.sample for each in batches[bad].substitutes} == {17}


def test_clips_that_are_too_short_are_refused(moving: Path) -> None:
    with pytest.raises(DataError, match=r"no clip has 13 frames that move, .* --objective.gap"):
        TrainLoader(
            OpenData(moving),
            (plan(FrameDraw(((4, 4),) * 3, 1)),),
            LoaderConfig(backend="torchvision", workers=1),
            seed=0,
            batch_size=4,
        )
