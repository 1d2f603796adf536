"""Damaged samples: replaced within a budget, by the same samples however the run is carried out."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from data_pipeline.crops import CropConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.damage import Damage, allowance, check_limit
from data_pipeline.reading.loader import EvalLoader, TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.reading.substitutes import candidates
from data_pipeline.views import views_of_one_size
from tests.data_pipeline import damaged, images
from tests.data_pipeline.betons import check_beton, read_sample_table
from tests.data_pipeline.damaged import NOISE, ZEROS, empty, far_away, together

pytestmark = pytest.mark.reliability(19)

N, BATCH, SIZE = 40, 10, 24
BACKENDS = ["ffcv", "torchvision"]
BAD = {3, 11, 20, 31}
"""Noise in a JPEG, no JPEG, out of bounds, zero size."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("substitutes")
    files = {f"class {i % 4}/{i:02d}.jpg": images.jpeg(60, 70, seed=i) for i in range(N)}
    images.write_folder(folder / "set", files)
    config = PackConfig(workers=1, format="jpeg")
    pack(str(folder / "set"), folder / "sound.beton", config, progress=False)
    return folder / "sound.beton"


@pytest.fixture(scope="module")
def bad(sound: Path) -> Path:
    """Four of forty samples damaged, each in its own way."""
    path = damaged.overwritten(sound, sound.with_name("bad.beton"), {3: NOISE, 11: ZEROS})
    return damaged.changed(path, path, together(far_away(20), empty(31)))


def open_train(
    path: Path, backend: str = "torchvision", damaged: float = 0.1, **options: int
) -> TrainLoader:
    config = LoaderConfig(backend=backend, workers=2)  # type: ignore[arg-type]
    arguments = {"seed": 3, "batch_size": BATCH} | options
    views = views_of_one_size(CropConfig(size=SIZE))
    return TrainLoader(OpenData(path, damaged), views, config, **arguments)  # type: ignore[arg-type]


def take(source: TrainLoader, count: int = 4, start: Position | None = None) -> list[Batch]:
    with closing(source):
        return [b for b, _ in zip(source.starting_at(start or Position()), range(count))]


def replaced(batches: list[Batch]) -> dict[int, int]:
    return {each.sample: each.shown for batch in batches for each in batch.substitutes}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_damage_is_replaced_and_said(bad: Path, sound: Path, backend: str) -> None:
    """An epoch holds each sample once, so each damaged one is met once."""
    batches, intact = take(open_train(bad, backend)), take(open_train(sound, backend))
    stand_ins = replaced(batches)
    assert stand_ins.keys() == BAD
    assert not BAD & set(stand_ins.values())
    table = read_sample_table(sound)
    for mine, other in zip(batches, intact):
        assert torch.equal(mine.ids_B, other.ids_B), "the order is that of the sound file"
        for place, sample in enumerate(mine.ids_B.tolist()):
            shown = stand_ins.get(sample, sample)
            assert mine.labels_B[place] == table.labels[shown]
            same = torch.equal(mine.crops_BVHWC[place], other.crops_BVHWC[place])
            assert same == (sample not in BAD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda"])
def test_a_damaged_header_takes_no_other_sample_with_it(
    sound: Path, tmp_path: Path, backend: str, marker: bytes
) -> None:
    """libjpeg-turbo that failed after a frame's header fails at the next picture too."""
    table = read_sample_table(sound)
    at = sound.read_bytes().rindex(marker, 0, int(table.offsets[3] + table.sizes[3]))
    patch = (b"\0\1", at + 2 - int(table.offsets[3]))  # a segment of one byte
    path = damaged.overwritten(sound, tmp_path / "x.beton", {3: patch})
    config = LoaderConfig(backend=backend, workers=1)  # type: ignore[arg-type]
    with closing(EvalLoader(OpenData(path, 1), 24, 24, config, batch_size=N)) as source:
        assert replaced(list(source)).keys() == {3}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_without_tables_does_not_borrow_those_of_the_one_before(
    sound: Path, tmp_path: Path, backend: str
) -> None:
    """Which one that is depends on the number of processes and threads."""
    table, data = read_sample_table(sound), sound.read_bytes()
    at = data.index(b"\xff\xdb", int(table.offsets[3])) - int(table.offsets[3])
    # Both quantisation tables become application data, which decoders pass over.
    second = data.index(b"\xff\xdb", int(table.offsets[3]) + at + 2) - int(table.offsets[3])
    path = damaged.overwritten(sound, tmp_path / "x.beton", {3: (b"\xff\xe5", at)})
    path = damaged.overwritten(path, path, {3: (b"\xff\xe5", second)})
    config = LoaderConfig(backend=backend, workers=1)  # type: ignore[arg-type]
    with closing(EvalLoader(OpenData(path, 1), 24, 24, config, batch_size=N)) as source:
        assert replaced(list(source)).keys() == {3}
    with pytest.raises(DataError, match=r"sample 3 .*Quantization table 0x00 was not defined\)"):
        take(open_train(path, backend, damaged=0))


def test_a_substitute_is_shown_under_the_damaged_samples_number(bad: Path) -> None:
    """Boxes drawn for the damaged sample: beside its own views, a substitute's are others."""
    batches = take(open_train(bad))
    crops = {int(i): crop for b in batches for i, crop in zip(b.ids_B, b.crops_BVHWC)}
    for sample, shown in replaced(batches).items():
        assert not torch.equal(crops[sample], crops[shown])


def test_both_backends_show_the_same_samples(bad: Path) -> None:
    ours, theirs = (take(open_train(bad, backend), 8) for backend in BACKENDS)
    for mine, other in zip(ours, theirs):
        shown = [[(e.sample, e.shown) for e in b.substitutes] for b in (mine, other)]
        assert shown[0] == shown[1]
        difference = (mine.crops_BVHWC.int() - other.crops_BVHWC.int()).abs().float()
        assert difference.mean() < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_world_size_and_any_resume_shows_the_same(bad: Path, backend: str) -> None:
    whole = take(open_train(bad, backend), 6)
    ranks = [take(open_train(bad, backend, rank=rank, world_size=2), 6) for rank in range(2)]
    resumed = take(open_train(bad, backend), 3, Position(0, 3))
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.crops_BVHWC for part in parts]), batch.crops_BVHWC)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), batch.labels_B)
        assert parts[0].substitutes + parts[1].substitutes == batch.substitutes
    for batch, again in zip(whole[3:], resumed):
        assert torch.equal(batch.crops_BVHWC, again.crops_BVHWC)
        assert batch.substitutes == again.substitutes


def test_substitutes_are_a_function_of_seed_epoch_and_sample() -> None:
    reference = candidates(1, 2, 3, 1000).tolist()
    assert reference == candidates(1, 2, 3, 1000).tolist()
    assert all(0 <= shown < 1000 for shown in reference)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert candidates(*other, 1000).tolist() != reference
    # Pinned: resuming a run with another version must show the same.
    assert candidates(0, 0, 7, 100)[:4].tolist() == PINNED


PINNED = [52, 65, 50, 94]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_budget_the_first_damaged_sample_is_an_error(sound: Path, backend: str) -> None:
    path = damaged.overwritten(sound, sound.with_name(f"strict-{backend}.beton"), {3: NOISE})
    with pytest.raises(DataError, match=r"strict-.*: sample 3 does not decode \(.+\); pack"):
        take(open_train(path, backend, damaged=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (far_away(20), "sample 20 points past the end of the file; pack"),
        (empty(31), "sample 31 has no image data; pack"),
        (together(far_away(20), empty(31)), "sample 20 points past"),
    ],
)
def test_without_a_budget_damaged_tables_are_refused_at_opening(
    sound: Path, tmp_path: Path, change: damaged.Change, message: str
) -> None:
    path = damaged.changed(sound, tmp_path / "x.beton", change)
    with pytest.raises(DataError, match=message):
        check_beton(path)


def test_more_damaged_tables_than_allowed_are_refused_by_number(
    sound: Path, tmp_path: Path
) -> None:
    change = together(empty(30), empty(31), far_away(20))
    path = damaged.changed(sound, tmp_path / "x.beton", change)
    assert check_beton(path, max_damaged=3).num_damaged == 3
    with pytest.raises(
        DataError, match=r"x\.beton: at least 3 samples are damaged, 2 may be: 20, 30, 31 \(s"
    ):
        check_beton(path, max_damaged=2)
    with pytest.raises(DataError, match=r"raise --data\.max-substitutes"):
        open_train(path, damaged=0.05)


def test_damaged_entries_lead_nowhere(bad: Path) -> None:
    """Whoever follows an entry all the same finds an empty sample inside the file."""
    table = read_sample_table(bad, max_damaged=2)
    assert set(table.damaged) == {20, 31}
    for sample in table.damaged:
        assert (table.sizes[sample], table.heights[sample], table.widths[sample]) == (0, 1, 1)
        assert 0 < table.offsets[sample] < bad.stat().st_size


def test_of_two_samples_that_share_bytes_neither_is_shown(sound: Path, tmp_path: Path) -> None:
    def change(header: np.ndarray, metadata: np.ndarray, allocations: np.ndarray) -> None:
        order = np.argsort(allocations["sample_id"])
        allocations["ptr"][order[8]] = allocations["ptr"][order[7]]
        metadata["f0"]["data_ptr"][8] = metadata["f0"]["data_ptr"][7]

    path = damaged.changed(sound, tmp_path / "x.beton", change)
    assert set(read_sample_table(path, max_damaged=2).damaged) == {7, 8}


def test_a_file_without_a_sound_sample_is_refused(sound: Path, tmp_path: Path) -> None:
    path = damaged.changed(sound, tmp_path / "x.beton", together(*map(empty, range(N))))
    with pytest.raises(DataError, match="all of its 40 samples are damaged"):
        check_beton(path, max_damaged=N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_decodes_the_search_ends(sound: Path, tmp_path: Path, backend: str) -> None:
    patches = dict.fromkeys(range(N), ZEROS)
    path = damaged.overwritten(sound, tmp_path / "x.beton", patches)
    with pytest.raises(DataError, match=r"x\.beton: sample \d+ does not decode .* tried in its"):
        take(open_train(path, backend, damaged=N))


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_shows_another_sample_with_its_label(bad: Path, backend: str) -> None:
    config = LoaderConfig(backend=backend, workers=1)  # type: ignore[arg-type]
    with closing(EvalLoader(OpenData(bad, 4), 24, 24, config, batch_size=16)) as source:
        batches = list(source)
        assert source.data.info.has_label
    assert torch.cat([batch.ids_B for batch in batches]).tolist() == list(range(N))
    assert replaced(batches).keys() == BAD
    labels, table = torch.cat([batch.labels_B for batch in batches]), read_sample_table(bad, 4)
    for sample, shown in replaced(batches).items():
        assert labels[sample] == table.labels[shown]


@pytest.mark.parametrize(
    ("limit", "count"), [(0, 0), (1e-4, 1), (0.5, 500), (0.0101, 11), (1, 1), (7, 7)]
)
def test_a_limit_below_one_is_a_fraction_rounded_up(limit: float, count: int) -> None:
    check_limit(limit, "x")
    assert allowance(limit, 1000) == count


@pytest.mark.parametrize("limit", [-1, 1.5, float("nan"), float("inf")])
def test_a_limit_that_means_nothing_is_refused(limit: float) -> None:
    with pytest.raises(DataError, match=r"--data\.max-substitutes must be"):
        check_limit(limit, "--data.max-substitutes")


def test_damage_counts_samples_not_times() -> None:
    damage = Damage("x.beton", 10, 2)
    for sample in (1, 2, 1, 2):
        damage.note(sample, "is bad")
    damage.mark(np.arange(10) == 1, "is worse")
    assert damage.reasons == {1: "is bad", 2: "is bad"}
    assert damage.sound().sum() == 8
    with pytest.raises(
        DataError, match=r"at least 3 samples are damaged, 2 may be: 1, 2, 3 \(sample 1 is bad"
    ):
        damage.mark(np.arange(10) > 0, "is bad")


def test_batches_of_a_sound_file_say_nothing(sound: Path) -> None:
    assert all(batch.substitutes == () for batch in take(open_train(sound)))
