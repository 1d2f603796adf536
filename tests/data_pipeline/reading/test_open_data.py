"""Several .beton files as one set."""

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.loader import Batch, EvalLoader, TrainLoader
from data_pipeline.reading.manifest import manifest_path
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from tests.data_pipeline import images
from tests.data_pipeline.batches import CROP, digest
from tests.data_pipeline.betons import check_beton
from tests.data_pipeline.damaged import ZEROS, changed, far_away, overwritten

BACKENDS = ["ffcv", "torchvision"]
CLASSES = {"one": ("a", "b"), "two": ("c", "d"), "both": ("a", "b", "c", "d")}
EACH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one.beton`` and ``two.beton``, of two classes each, and ``both.beton`` of all four."""
    folder = tmp_path_factory.mktemp("several")
    for name, classes in CLASSES.items():
        files = {
            f"{each}/{number}.jpg": images.jpeg(40, 40 + number, seed=10 * ord(each) + number)
            for each in classes
            for number in range(EACH)
        }
        images.write_folder(folder / name, files)
        config = PackConfig(workers=1, format="jpeg")
        pack(str(folder / name), folder / f"{name}.beton", config, progress=False)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Path]:
    return [folder / "one.beton", folder / "two.beton"]


def epoch(
    data: OpenData, backend: str, start: int = 0, order: EpochOrder | None = None
) -> list[Batch]:
    config = LoaderConfig(backend=backend, workers=2)  # type: ignore[arg-type]
    loader = TrainLoader(data, views_of_one_size(CROP), config, seed=3, batch_size=8)
    with closing(loader):
        return list(loader.epoch(Position(1, start), order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_files_are_read_as_one_with_all_their_samples(
    folder: Path, two: list[Path], backend: str
) -> None:
    both = OpenData(folder / "both.beton")
    assert digest(epoch(OpenData(two), backend)) == digest(epoch(both, backend))


def test_evaluation_reads_them_alike(folder: Path, two: list[Path]) -> None:
    found = []
    for data in (OpenData(two), OpenData(folder / "both.beton")):
        loader = EvalLoader(data, 24, 24, LoaderConfig(workers=1), batch_size=5, world_size=2)
        with closing(loader):
            found.append(digest(list(loader)))
    assert found[0] == found[1]


def test_what_the_set_holds(folder: Path, two: list[Path]) -> None:
    data, parts = OpenData(two).info, [check_beton(path) for path in two]
    assert data.num_samples == data.num_labelled == 4 * EACH
    assert data.class_names == ("a", "b", "c", "d")
    assert data.paths == tuple(two) and data.name == f"{two[0]} and 1 more"
    for of_set, of_parts in (
        (data.identity, [part.identity for part in parts]),
        (data.fingerprint, [part.fingerprint for part in parts]),
    ):
        assert len(of_set) == 64 and of_set not in of_parts
    turned = OpenData(two[::-1]).info
    assert turned.identity != data.identity and turned.class_names == ("c", "d", "a", "b")
    alone = OpenData(two[0]).info
    assert (alone.identity, alone.fingerprint) == (parts[0].identity, parts[0].fingerprint)


def test_a_class_that_files_share_has_one_number(folder: Path, tmp_path: Path) -> None:
    images.write_folder(tmp_path / "more", {f"{name}/0.png": images.png("RGB") for name in "db"})
    pack(str(tmp_path / "more"), tmp_path / "more.beton", PackConfig(workers=1), progress=False)
    data = OpenData([folder / "one.beton", tmp_path / "more.beton"])
    assert data.info.class_names == ("a", "b", "d")
    assert data.table.labels.tolist() == [0] * EACH + [1] * EACH + [1, 2]


def test_unlabelled_files_stand_beside_labelled_ones(folder: Path, tmp_path: Path) -> None:
    config = PackConfig(workers=1, labels=False)
    pack(str(folder / "two"), tmp_path / "flat.beton", config, progress=False)
    data = OpenData([tmp_path / "flat.beton", folder / "one.beton"])
    assert data.info.class_names == ("a", "b") and not data.info.has_label
    assert data.table.labels.tolist() == [-1] * 2 * EACH + [0] * EACH + [1] * EACH


def test_labels_without_names_do_not_join_those_with_names(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.beton"
    bare.write_bytes((folder / "two.beton").read_bytes())
    with pytest.raises(DataError, match=r"bare\.beton: has labels and no manifest .* FILE\.beton"):
        OpenData([folder / "one.beton", bare])
    assert OpenData(bare).info.fingerprint == ""
    assert not manifest_path(bare).exists()


def test_a_file_is_named_once(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.beton"
    again.write_bytes((folder / "one.beton").read_bytes())
    manifest_path(again).write_bytes(manifest_path(folder / "one.beton").read_bytes())
    with pytest.raises(DataError, match=r"again\.beton: has the content of .*one\.beton, which"):
        OpenData([folder / "one.beton", again])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_sample_is_named_by_its_file_and_its_number_there(
    two: list[Path], tmp_path: Path, backend: str
) -> None:
    good = overwritten(two[0], tmp_path / "good.beton", {})
    bad = overwritten(two[1], tmp_path / "bad.beton", {5: ZEROS})
    with pytest.raises(DataError, match=r"bad\.beton: sample 5 does not decode"):
        epoch(OpenData([good, bad]), backend)


def test_damage_is_allowed_to_the_set_and_not_to_each_file(two: list[Path], tmp_path: Path) -> None:
    bad = [changed(path, tmp_path / path.name, far_away(3)) for path in two]
    data = OpenData(bad, 2)
    assert list(data.table.damaged) == [3, 2 * EACH + 3]
    shown = [each for batch in epoch(data, "ffcv") for each in batch.substitutes]
    assert {each.sample for each in shown} == {3, 2 * EACH + 3}
    assert {each.why for each in shown} == {"points past the end of the file"}
    with pytest.raises(DataError, match=r"two\.beton: sample 3 points past"):
        OpenData(bad, 1)


def test_an_epoch_ends_and_begins_anywhere(folder: Path) -> None:
    data = OpenData(folder / "both.beton")
    whole = epoch(data, "torchvision")
    assert [batch.position for batch in whole] == [Position(1, step) for step in range(3)]
    assert digest(epoch(data, "torchvision", start=1)) == digest(whole[1:])
    config = LoaderConfig(backend="torchvision", workers=1)
    loader = TrainLoader(data, views_of_one_size(CROP), config, seed=3, batch_size=8)
    with closing(loader):
        endless = list(itertools.islice(loader.starting_at(Position(1, 0)), 3))
    assert digest(endless) == digest(whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_comes_again_shows_other_views(folder: Path, backend: str) -> None:
    data = OpenData(folder / "both.beton")
    order = EpochOrder.weighted(np.array([1.0, 1.0] + [0.0] * 22), 24)
    batches = epoch(data, backend, order=order)
    ids, numbers = (torch.cat(each) for each in zip(*((b.ids_B, b.drawn_by_B) for b in batches)))
    crops = torch.cat([batch.crops_BVHWC for batch in batches])
    assert ids.bincount().tolist() == [12, 12]
    own = epoch(data, backend)
    for sample in (0, 1):
        shown = crops[ids == sample]
        assert len(shown.flatten(1).unique(dim=0)) == 12
        mine = shown[(numbers[ids == sample] == sample).nonzero()[0, 0]]
        (plain,) = (b.crops_BVHWC[b.ids_B == sample] for b in own if sample in b.ids_B)
        assert torch.equal(mine, plain[0]), "the first time it is as in any epoch"


def test_an_order_of_another_length_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="16 places are not 3 steps"):
        epoch(OpenData(folder / "both.beton"), "torchvision", order=EpochOrder.of(np.arange(16)))


def test_nothing_named_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no \.beton file is named"):
        OpenData([])


def test_labelled_files_without_names_are_said_to_share_numbers(
    two: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = [overwritten(path, tmp_path / path.name, {}) for path in two]
    data = OpenData(bare)
    assert data.table.labels.tolist() == 2 * ([0] * EACH + [1] * EACH)
    assert "one.beton and 1 more: no manifest names classes" in caplog.text


def test_samples_are_found_again_in_a_set_that_has_their_files(
    folder: Path, two: list[Path]
) -> None:
    both, turned = OpenData(two), OpenData(two[::-1])
    half, count = OpenData(two[1]), 2 * EACH
    assert both.places_in(both).tolist() == list(range(2 * count))  # type: ignore[union-attr]
    assert half.places_in(both).tolist() == list(range(count, 2 * count))  # type: ignore[union-attr]
    assert half.places_in(turned).tolist() == list(range(count))  # type: ignore[union-attr]
    assert both.places_in(half) is None
    assert both.places_in(OpenData(folder / "both.beton")) is None
