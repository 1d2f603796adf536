"""The same training batches however they are made: workers, ranks, backend, start."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.reading.order import Position, permute
from tests.data_pipeline.batches import (
    BATCH,
    SIZE,
    N,
    digest,
    open_train,
    pack_raw,
    take,
)
from tests.data_pipeline.betons import read_sample_table


@pytest.fixture(scope="module")
def raw(jpegs: Path) -> Path:
    return pack_raw(jpegs)


def test_batches_are_what_they_say(jpegs: Path) -> None:
    (batch,) = take(open_train(jpegs), 1)
    assert batch.crops_BVHWC.shape == (BATCH, 2, SIZE, SIZE, 3)
    assert batch.crops_BVHWC.dtype == torch.uint8
    assert batch.ids_B.dtype == batch.labels_B.dtype == torch.int64
    assert batch.ids_B.tolist() == permute(3, 0, np.arange(BATCH), N).tolist()
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
        places = batch.position.step * BATCH + np.arange(BATCH)
        assert batch.ids_B.tolist() == permute(3, batch.position.epoch, places, N).tolist()


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
from tests.data_pipeline.batches import digest, open_train, take
print(digest(take(open_train(Path({str(jpegs)!r}), workers=1), 4)), torch.get_num_threads())
"""
    environment = os.environ | {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "99"}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # FFCV's import sets torch's threads to 1 where nobody prevents it.
    assert done.stdout.split() == [digest(take(open_train(jpegs), 4)), "3"]
