"""Packing processes give results in order, in bounded memory, and never hang."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.packing.image_codec import CodecConfig, LeftOut, Stored
from data_pipeline.packing.pack_workers import Chunk, WorkerDiedError, encode_in_order
from tests.data_pipeline import images
from tests.data_pipeline.packed import children


def arrays(count: int, size: int = 8) -> Iterator[Chunk]:
    for i in range(count):
        yield [(i, np.full((size, size, 3), i % 251, np.uint8))]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_however_slow_the_first_is(workers: int) -> None:
    slow = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)
    chunks: list[Chunk] = [[(0, slow)], *[[(i, images.picture(8, 8))] for i in range(1, 60)]]
    config = CodecConfig(format="jpeg")
    results = list(encode_in_order(iter(chunks), config, workers))
    assert [index for index, _ in results] == list(range(60))
    assert all(isinstance(result, Stored) for _, result in results)


def test_little_is_held_back_behind_a_slow_image() -> None:
    """Memory stays bounded: no more are begun until the first image is through."""
    taken = []
    slow = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), np.uint8)
    fast = np.full((200, 200, 3), 7, np.uint8)  # 120 kB raw each

    def chunks() -> Iterator[Chunk]:
        yield [(0, slow)]
        for i in range(1, 300):
            taken.append(i)
            yield [(i, fast)]

    results = encode_in_order(chunks(), CodecConfig(format="raw"), 2)
    assert next(results)[0] == 0
    assert len(taken) < 4
    assert [index for index, _ in results] == list(range(1, 300))


def test_left_out_is_not_stored() -> None:
    (result,) = encode_in_order([[(5, "/nowhere/x.jpg")]], CodecConfig(), 1)
    assert result == (5, LeftOut("No such file or directory"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_process_is_an_error_and_never_a_hang(number: signal.Signals) -> None:
    before = children()
    results = encode_in_order(arrays(100_000), CodecConfig(), 2)
    for _ in zip(range(2000), results):  # by now both processes have work in hand
        pass
    victim = min(children() - before)
    os.kill(victim, number)
    with pytest.raises(WorkerDiedError, match=f"killed by {number.name}") as raised:
        list(results)
    assert raised.value.index >= 2000
    assert children() <= before
