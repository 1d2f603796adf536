"""What the loader promises: the same batches however they are made, and errors instead of hangs."""

import gc
import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from data_pipeline import ffcv_compat, loader
from data_pipeline.beton import read_sample_table
from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, LoaderConfig, TrainLoader, eval_loader, train_loader
from data_pipeline.order import Position, global_batch_ids
from data_pipeline.pack import PackConfig, pack
from data_pipeline.views import CropConfig
from tests.data_pipeline.images import encoded, picture

N, BATCH, SIZE = 45, 12, 32
CROP = CropConfig(size=SIZE)
START = Position()


def write_images(folder: Path) -> None:
    """JPEGs of every kind that is passed through: subsamplings, grey, progressive, odd sizes."""
    kinds = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)]
    for number in range(N):
        image = Image.fromarray(picture(61 + 5 * (number % 7), 90 - number, number))
        image = image.convert("L") if number % 9 == 8 else image
        data = encoded(image, "JPEG", quality=90, **kinds[number % len(kinds)])
        target = folder / "ab"[number % 2] / f"{number:03d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jpegs")
    write_images(folder / "images")
    config = PackConfig(workers=1, format="jpeg")
    pack(str(folder / "images"), folder / "jpegs.beton", config, progress=False)
    return folder / "jpegs.beton"


@pytest.fixture(scope="module")
def raw(jpegs: Path) -> Path:
    path = jpegs.with_name("raw.beton")
    config = PackConfig(workers=1, format="raw", labels=False)
    pack(str(jpegs.parent / "images"), path, config, progress=False)
    return path


def open_train(path: Path, backend: str = "ffcv", workers: int = 2, **options: int) -> TrainLoader:
    config = LoaderConfig(backend=backend, workers=workers)  # type: ignore[arg-type]
    arguments = {"seed": 3, "batch_size": BATCH} | options
    return train_loader(path, CROP, config, **arguments)  # type: ignore[arg-type]


def take(source: TrainLoader, count: int, start: Position = START) -> list[Batch]:
    with closing(source):
        return list(itertools.islice(source.starting_at(start), count))


def digest(batches: list[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.crops_BVHWC, batch.ids_B, batch.labels_B):
            total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def decoding_threads() -> int:
    return sum("widebatch-decode" in thread.name for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not decoding_threads()


def test_batches_are_what_they_say(jpegs: Path) -> None:
    (batch,) = take(open_train(jpegs), 1)
    assert batch.crops_BVHWC.shape == (BATCH, 2, SIZE, SIZE, 3)
    assert batch.crops_BVHWC.dtype == torch.uint8
    assert batch.ids_B.dtype == batch.labels_B.dtype == torch.int64
    assert batch.ids_B.tolist() == global_batch_ids(3, Position(), BATCH, N).tolist()
    labels = read_sample_table(jpegs).labels
    assert batch.labels_B.tolist() == labels[batch.ids_B.numpy()].tolist()


def test_a_file_without_labels_says_minus_one(raw: Path) -> None:
    (batch,) = take(open_train(raw), 1)
    assert batch.labels_B.tolist() == [-1] * BATCH


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_the_number_of_workers_changes_no_byte(jpegs: Path, backend: str) -> None:
    digests = {digest(take(open_train(jpegs, backend, workers), 4)) for workers in (1, 2, 5)}
    assert len(digests) == 1


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_world_size_reads_the_same_global_batches(jpegs: Path, world_size: int) -> None:
    whole = take(open_train(jpegs), 4)
    ranks = [
        take(open_train(jpegs, rank=rank, world_size=world_size), 4) for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.ids_B for part in parts]), batch.ids_B)
        assert torch.equal(torch.cat([part.crops_BVHWC for part in parts]), batch.crops_BVHWC)
        assert all(part.position == batch.position for part in parts)


@pytest.mark.parametrize("start", [Position(0, 2), Position(1, 0), Position(1, 1)])
def test_starting_anywhere_gives_what_would_have_come(jpegs: Path, start: Position) -> None:
    whole = take(open_train(jpegs), 7)
    skipped = start.epoch * 3 + start.step
    assert digest(take(open_train(jpegs), 7 - skipped, start)) == digest(whole[skipped:])


def test_batches_go_on_over_the_ends_of_epochs(jpegs: Path) -> None:
    batches = take(open_train(jpegs), 8)
    places = [(b.position.epoch, b.position.step) for b in batches]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    for batch in batches:
        assert batch.ids_B.tolist() == global_batch_ids(3, batch.position, BATCH, N).tolist()


def test_an_epoch_shows_other_crops_of_the_same_images(jpegs: Path) -> None:
    batches = take(open_train(jpegs), 6)
    first = {int(i): crop for b in batches[:3] for i, crop in zip(b.ids_B, b.crops_BVHWC)}
    for batch in batches[3:]:
        for sample, crop in zip(batch.ids_B, batch.crops_BVHWC):
            if int(sample) in first:
                assert not torch.equal(crop, first[int(sample)])
            assert not torch.equal(crop[0], crop[1])


def test_a_kept_batch_is_not_overwritten(jpegs: Path) -> None:
    source = open_train(jpegs)
    batches = source.starting_at(Position())
    first = next(batches)
    before = first.crops_BVHWC.clone()
    for _ in range(12):
        next(batches)
    assert torch.equal(first.crops_BVHWC, before)
    source.close()


@pytest.mark.parametrize(("file", "mean", "most"), [("jpegs", 1.0, 24), ("raw", 0.25, 1)])
def test_both_backends_cut_the_same_crops(
    file: str, mean: float, most: int, request: pytest.FixtureRequest
) -> None:
    """Raw images within one level. JPEGs as close as two libjpegs' colour upsampling."""
    path = request.getfixturevalue(file)
    for ours, theirs in zip(take(open_train(path), 6), take(open_train(path, "torchvision"), 6)):
        assert torch.equal(ours.ids_B, theirs.ids_B)
        assert torch.equal(ours.labels_B, theirs.labels_B)
        difference = (ours.crops_BVHWC.int() - theirs.crops_BVHWC.int()).abs().float()
        assert difference.mean((2, 3, 4)).max() < mean
        assert difference.max() <= most


def test_a_seed_gives_the_same_bytes_in_any_environment(jpegs: Path) -> None:
    code = f"""
import itertools, sys
from pathlib import Path
import torch
torch.set_num_threads(3)
from tests.data_pipeline.test_loader import digest, open_train, take
print(digest(take(open_train(Path({str(jpegs)!r}), workers=1), 4)), torch.get_num_threads())
"""
    environment = os.environ | {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "99"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # FFCV's import sets torch's threads to 1 where nobody prevents it.
    assert done.stdout.split() == [digest(take(open_train(jpegs), 4)), "3"]


# Evaluation


def evaluate(
    path: Path, size: int = SIZE, resize: int | None = None, **options: int
) -> list[Batch]:
    arguments = {"batch_size": 10} | options
    source = eval_loader(path, size, resize, LoaderConfig(workers=2), **arguments)  # type: ignore[arg-type]
    with closing(source):
        batches = list(source)
        assert digest(batches) == digest(list(source)), "a second pass differs"
        assert len(source) == len(batches)
    return batches


def test_evaluation_shows_every_sample_once_in_order(jpegs: Path) -> None:
    batches = evaluate(jpegs)
    assert [len(batch.ids_B) for batch in batches] == [10, 10, 10, 10, 5]
    assert torch.cat([batch.ids_B for batch in batches]).tolist() == list(range(N))
    assert batches[0].crops_BVHWC.shape == (10, 1, SIZE, SIZE, 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_evaluation_are_its_parts(jpegs: Path, world_size: int) -> None:
    whole = torch.cat([batch.crops_BVHWC for batch in evaluate(jpegs)])
    shards = [
        batch.crops_BVHWC
        for rank in range(world_size)
        for batch in evaluate(jpegs, rank=rank, world_size=world_size)
    ]
    assert torch.equal(torch.cat(shards), whole)


def test_a_process_without_samples_to_evaluate_gets_no_batches(jpegs: Path) -> None:
    assert evaluate(jpegs, rank=0, world_size=50) == []


def test_evaluating_images_of_the_crops_size_changes_nothing(tmp_path: Path) -> None:
    pictures = [picture(24, 24, seed) for seed in range(3)]
    for number, pixels in enumerate(pictures):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(pixels, "PNG"))
    config = PackConfig(workers=1, format="raw")
    pack(str(tmp_path / "images"), tmp_path / "x.beton", config, progress=False)
    for backend in ("ffcv", "torchvision"):
        source = eval_loader(
            tmp_path / "x.beton",
            24,
            24,
            LoaderConfig(backend=backend),
            batch_size=8,  # type: ignore[arg-type]
        )
        (batch,) = source
        assert np.array_equal(batch.crops_BVHWC[:, 0].numpy(), np.stack(pictures))
        source.close()


# Faults


def damage(path: Path, target: Path, sample: int, patch: bytes, at: int) -> Path:
    """A copy with ``patch`` written over one sample's data, and without its manifest."""
    data = bytearray(path.read_bytes())
    table = read_sample_table(path)
    start = int(table.offsets[sample]) + (at if at >= 0 else int(table.sizes[sample]) + at)
    data[start : start + len(patch)] = patch
    target.write_bytes(data)
    return target


DAMAGES = {
    "beginning": (b"XXXX", 0),
    "all zero": (bytes(300), 0),
    "end": (bytes(200), -200),
    "noise": (bytes(range(1, 120)), -250),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_jpeg_is_named(jpegs: Path, tmp_path: Path, kind: str) -> None:
    bad = damage(jpegs, tmp_path / "bad.beton", 7, *DAMAGES[kind])
    with pytest.raises(
        DataError, match=r"bad.beton: sample 7 does not decode \(.+\); pack"
    ) as info:
        evaluate(bad)
    assert "\n" not in str(info.value)


def test_the_fallback_names_a_damaged_jpeg_too(jpegs: Path, tmp_path: Path) -> None:
    bad = damage(jpegs, tmp_path / "bad.beton", 7, *DAMAGES["all zero"])
    source = eval_loader(bad, SIZE, None, LoaderConfig(backend="torchvision"), batch_size=10)
    with pytest.raises(DataError, match=r"bad.beton: sample 7 does not decode \(.+\); pack"):
        list(source)
    source.close()


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_jpeg_of_other_dimensions_than_the_table_says_is_refused(
    jpegs: Path, tmp_path: Path, backend: str
) -> None:
    """FFCV decodes such a sample to stale pixels, or past the end of its buffer."""
    table, data = read_sample_table(jpegs), jpegs.read_bytes()
    start = int(table.offsets[7])
    frame = min(at for m in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(m, start)) >= 0) - start
    bad = damage(jpegs, tmp_path / "bad.beton", 7, (9000).to_bytes(2, "big") * 2, frame + 5)
    config = LoaderConfig(backend=backend)  # type: ignore[arg-type]
    with (
        closing(eval_loader(bad, SIZE, None, config, batch_size=10)) as source,
        pytest.raises(DataError, match=r"sample 7 .*its own header says 9000 x 9000 pixels"),
    ):
        list(source)


def test_any_exception_while_decoding_reaches_the_consumer(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_train(jpegs)
    calls = itertools.count()
    decode = source._source.decoder.decode

    def fails_later(*arguments: npt.NDArray[np.generic]) -> None:
        if next(calls) == 5:
            raise RuntimeError("boom")
        decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source._source.decoder, "decode", fails_later)
    with pytest.raises(RuntimeError, match="boom"):
        for _ in source.starting_at(Position()):
            pass
    source.close()


def test_breaking_off_leaves_no_threads_and_no_memory(jpegs: Path) -> None:
    def once() -> None:
        source = open_train(jpegs)
        for _ in source.starting_at(Position()):
            break
        source.close()

    def resident() -> int:
        gc.collect()
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(5):
        once()
    before = resident()
    for _ in range(40):
        once()
    assert not decoding_threads()
    assert resident() - before < 8 << 20  # FFCV's loader: 36 MB each time


def test_iterators_end_when_their_loader_is_closed(jpegs: Path) -> None:
    source = open_train(jpegs)
    batches = source.starting_at(Position())
    next(batches)
    source.close()
    source.close()
    assert list(itertools.islice(batches, 20)) == []


def test_two_iterators_of_one_loader_do_not_disturb_each_other(jpegs: Path) -> None:
    source = open_train(jpegs)
    pairs = itertools.islice(
        zip(source.starting_at(Position()), source.starting_at(Position(1, 2))), 4
    )
    first, second = (list(batches) for batches in zip(*pairs))
    source.close()
    assert digest(first) == digest(take(open_train(jpegs), 4))
    assert digest(second) == digest(take(open_train(jpegs), 4, Position(1, 2)))


def test_waiting_is_counted_and_working_is_not(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_train(jpegs)
    decode = source._source.decoder.decode

    def slowly(*arguments: npt.NDArray[np.generic]) -> None:
        time.sleep(0.2)
        decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source._source.decoder, "decode", slowly)
    batches = source.starting_at(Position())
    next(batches)
    waited = source.wait_seconds
    assert waited >= 0.15
    time.sleep(1.5)  # the consumer works; batches are made meanwhile
    next(batches)
    assert source.wait_seconds - waited < 0.1
    source.close()


# Refusals


def test_a_batch_larger_than_the_data_is_refused(jpegs: Path) -> None:
    with pytest.raises(DataError, match="45 samples are fewer than one global batch of 46"):
        open_train(jpegs, batch_size=46)


def test_a_batch_that_does_not_divide_is_refused(jpegs: Path) -> None:
    with pytest.raises(ValueError, match="12 does not divide by 5"):
        open_train(jpegs, rank=0, world_size=5)


@pytest.mark.parametrize("position", [Position(0, 3), Position(0, -1), Position(-1, 0)])
def test_a_position_that_no_epoch_has_is_refused(jpegs: Path, position: Position) -> None:
    source = open_train(jpegs)
    with pytest.raises(IndexError, match="epochs have steps 0 to 2"):
        source.starting_at(position)
    source.close()


def test_impossible_evaluation_sizes_are_refused(jpegs: Path) -> None:
    with pytest.raises(DataError, match="resize >= size"):
        eval_loader(jpegs, 64, 32, LoaderConfig(), batch_size=8)


@pytest.mark.parametrize(
    "settings",
    [{"backend": "dali"}, {"workers": -1}, {"prefetch": 0}, {"max_reduction": 3}],
)
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(settings))):
        LoaderConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which ``import ffcv`` fails."""
    for cached in (ffcv_compat.import_ffcv, ffcv_compat.bind_symbols):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    yield
    for cached in (ffcv_compat.import_ffcv, ffcv_compat.bind_symbols):
        cached.cache_clear()


@pytest.mark.usefixtures("no_ffcv")
def test_without_ffcv_auto_falls_back_and_ffcv_says_why(jpegs: Path) -> None:
    source = open_train(jpegs, "auto")
    assert type(source._source.decoder).__name__ == "TorchvisionDecoder"
    source.close()
    with pytest.raises(DataError, match=r"FFCV cannot be used here .*--loader.backend torchvision"):
        open_train(jpegs, "ffcv")


def test_the_fallback_imports_neither_ffcv_nor_numba(jpegs: Path) -> None:
    code = f"""
import sys
sys.modules["ffcv"] = sys.modules["numba"] = None
from data_pipeline.loader import *
config = LoaderConfig(backend="torchvision", workers=1)
source = train_loader({str(jpegs)!r}, CropConfig(size=8), config, seed=0, batch_size=4)
print(len(next(source.starting_at(Position())).ids_B))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr


def test_decoding_reduced_is_bounded_and_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(4):
        data = encoded(picture(400, 600, seed), "JPEG", quality=90)
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(data)
    path = tmp_path / "x.beton"
    pack(str(tmp_path / "images"), path, PackConfig(workers=1), progress=False)
    crops = {}
    for reduction in (1, 2, 8):
        config = LoaderConfig(workers=1, max_reduction=reduction)  # type: ignore[arg-type]
        source = eval_loader(path, SIZE, SIZE, config, batch_size=4)
        crops[reduction] = next(iter(source)).crops_BVHWC.int()
        source.close()
    for reduction in (2, 8):
        difference = (crops[reduction] - crops[1]).abs().float()
        assert 0 < difference.mean() < 2


def test_the_share_of_the_cores_is_divided_among_a_hosts_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for processes, share in (("1", 12), ("4", 3), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert loader._share_of_cores() == share
