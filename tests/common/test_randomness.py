"""Draws are a pure function of their coordinates."""

import numpy as np
import torch

from common import randomness
from common.randomness import GOLDEN, Stream, sample_keys, uniforms, uniforms_on_device


def test_the_hash_is_splitmix64() -> None:
    """First outputs of the reference generator (Vigna, splitmix64.c) for seed 0."""
    with np.errstate(over="ignore"):
        states = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert randomness.mix(states).tolist() == expected


def test_every_coordinate_changes_every_draw() -> None:
    base = {"seed": 1, "epoch": 2, "ids": np.arange(100), "view": 0, "stream": Stream.CROP}
    keys = sample_keys(**base)
    assert len(np.unique(keys)) == 100
    for change in ({"seed": 2}, {"epoch": 3}, {"view": 1}, {"stream": Stream.FLIP}):
        assert not np.intersect1d(keys, sample_keys(**(base | change))).size
    assert (uniforms(keys, 0) != uniforms(keys, 1)).all()


def test_coordinates_do_not_stand_in_for_each_other() -> None:
    """(seed 1, epoch 0) is not (seed 0, epoch 1), nor sample 1 of view 0 sample 0 of view 1."""
    assert sample_keys(1, 0, 0, 0, Stream.CROP) != sample_keys(0, 1, 0, 0, Stream.CROP)
    assert sample_keys(0, 0, 1, 0, Stream.CROP) != sample_keys(0, 0, 0, 1, Stream.CROP)


def test_draws_are_uniform_and_uncorrelated() -> None:
    n = 200_000
    keys = sample_keys(0, 0, np.arange(n), 0, Stream.CROP)
    first, second = uniforms(keys, 0), uniforms(keys, 1)
    other_view = uniforms(sample_keys(0, 0, np.arange(n), 1, Stream.CROP), 0)
    for draws in (first, second):
        assert (draws >= 0).all() and (draws < 1).all()
        counts = np.histogram(draws, 100, (0, 1))[0]
        assert abs(((counts - n / 100) ** 2 / (n / 100)).sum() - 99) < 5 * np.sqrt(2 * 99)
    for a, b in ((first, second), (first, other_view), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def test_the_draws_of_old_runs_stay_what_they_were() -> None:
    """A change here changes every run's augmentations and breaks resuming: never change these."""
    keys = sample_keys(42, 3, np.array([0, 1, 77]), 1, Stream.CROP)
    assert [hex(int(key)) for key in keys] == [
        "0xe88e29a473cd0bf3",
        "0x9a01a8ad8ed3bce6",
        "0x38939c8348244421",
    ]


def test_torch_draws_the_bits_of_numpy() -> None:
    ids = np.concatenate([np.arange(30), 7919 * np.arange(30) ** 3, [2**40, 2**62, -1]])
    views, streams = torch.arange(2, 5), torch.tensor(list(Stream))
    for seed, epoch in ((0, 0), (2**63 + 1, 299), (-5, 1)):
        drawn = uniforms_on_device(seed, epoch, torch.from_numpy(ids), views, streams)
        for v, view in enumerate(views.tolist()):
            for s, stream in enumerate(Stream):
                want = uniforms(sample_keys(seed, epoch, ids, view, stream))
                np.testing.assert_array_equal(drawn[v, :, s], want)
