"""The loader's threads end with it, pass on what went wrong, and count the waiting."""

import gc
import itertools
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.reading import order
from data_pipeline.reading.order import Position, permute
from tests.data_pipeline.batches import decoding_threads, digest, open_train, take


def test_any_exception_while_decoding_reaches_the_consumer(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_train(jpegs)
    calls = itertools.count()
    decode = source._decoder.decode

    def fails_later(*arguments: npt.NDArray[np.generic]) -> None:
        if next(calls) == 5:
            raise RuntimeError("boom")
        decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source._decoder, "decode", fails_later)
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
    decode = source._decoder.decode

    def slowly(*arguments: npt.NDArray[np.generic]) -> None:
        time.sleep(0.2)
        decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(source._decoder, "decode", slowly)
    batches = source.starting_at(Position())
    next(batches)
    waited = source.wait_seconds
    assert waited >= 0.15
    time.sleep(1.5)  # the consumer works; batches are made meanwhile
    next(batches)
    assert source.wait_seconds - waited < 0.1
    source.close()


def test_a_batch_is_planned_once_however_many_parts_it_is_decoded_in(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each part, planning would hold the interpreter's lock against the main thread."""
    asked: list[int] = []

    def counted(seed: int, epoch: int, positions: npt.NDArray[np.int64], n: int) -> object:
        asked.append(len(positions))
        return permute(seed, epoch, positions, n)

    monkeypatch.setattr(order, "permute", counted)
    source = open_train(jpegs, workers=3, batch_size=40)
    assert len(source._chunks(40)) == 5
    take(source, 1)
    assert set(asked) == {40}
    assert len(asked) <= 1 + source.config.prefetch + 1  # the batches begun ahead
