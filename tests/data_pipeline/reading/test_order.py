"""The order of samples is a pure function of (seed, epoch, position)."""

import numpy as np
import pytest

from data_pipeline.reading.order import EpochOrder, permute, rank_slice


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_every_epoch_visits_every_sample_once(n: int) -> None:
    for epoch in (0, 1, 12345):
        ids = permute(7, epoch, np.arange(n), n)
        assert np.array_equal(np.sort(ids), np.arange(n))


def test_positions_can_be_asked_for_one_by_one_and_in_any_shape() -> None:
    n = 999
    whole = permute(3, 4, np.arange(n), n)
    assert [int(permute(3, 4, p, n)) for p in (0, 1, 500, 998)] == whole[[0, 1, 500, 998]].tolist()
    grid = np.array([[5, 4], [998, 0]])
    assert np.array_equal(permute(3, 4, grid, n), whole[grid])


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 10_000
    orders = [permute(seed, epoch, np.arange(n), n) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a in range(3):
        for b in range(a):
            # Unrelated permutations agree in one place on average (Poisson).
            assert (orders[a] == orders[b]).sum() < 10
    assert abs(np.corrcoef(orders[0], np.arange(n))[0, 1]) < 0.05


def test_neighbours_are_spread_over_the_data_set() -> None:
    """Class-sorted files: no stretch of the order may favour a stretch of the file."""
    n, bins = 20_000, 20
    counts = np.stack(
        [
            np.histogram(permute(1, 0, np.arange(s, s + 1000), n), bins, (0, n))[0]
            for s in range(0, n, 1000)
        ]
    )
    chi_square = ((counts - 50.0) ** 2 / 50.0).sum()
    degrees = 19 * 19  # both margins are fixed
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_reads_the_same_global_batches(world_size: int) -> None:
    batch = permute(5, 2, np.arange(36, 48), 100)
    parts = [batch[rank_slice(12, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), batch)
    assert len({len(part) for part in parts}) == 1


def test_the_steps_of_an_epoch_share_no_sample() -> None:
    ids = permute(0, 1, np.arange(90), 100)
    assert len(np.unique(ids)) == 90


def test_an_order_of_some_samples_shows_each_once() -> None:
    ids_M = np.array([3, 8, 5, 40])
    ids, numbers = EpochOrder.of(ids_M).at(1, 2, np.arange(4))
    assert sorted(ids) == sorted(ids_M) and numbers is ids
    assert not np.array_equal(ids, EpochOrder.of(ids_M).at(1, 3, np.arange(4))[0])


def test_samples_take_places_in_proportion_to_their_weights() -> None:
    weights = np.array([0, 1, 2, 4, 0.5, 0.5, 0, 8, 0])
    order = EpochOrder.weighted(weights, 1000)
    counts = np.zeros(9)
    for epoch in range(20):
        ids, numbers = order.at(7, epoch, np.arange(1000))
        found = np.bincount(ids, minlength=9)
        # A sample's stretch has whole strata, which it has for sure, and one at each end.
        assert (np.abs(found - 1000 * weights / 16) <= 2).all()
        assert len(np.unique(numbers)) == 1000, "every showing has views of its own"
        assert np.array_equal(numbers % 9, ids) and (numbers >= ids).all()
        counts += found
    # At each end a coin that is tossed each epoch: 2 coins x 20 epochs, 6 standard deviations.
    assert (np.abs(counts - 20_000 * weights / 16) <= 6 * np.sqrt(2 * 20 * 0.25)).all()


def test_a_sample_that_comes_once_keeps_its_own_views() -> None:
    ids, numbers = EpochOrder.weighted(np.ones(50), 50).at(0, 0, np.arange(50))
    first = [numbers[ids == each].min() for each in np.unique(ids)]
    assert np.mean(first == np.unique(ids)) > 0.4  # others begin in the stratum of the one before


def test_groups_take_equal_shares_whatever_their_sizes() -> None:
    groups = np.array([2, 0, 0, 7, 0, 0, -1, 0, 0, 2, 0] * 10)
    order = EpochOrder.balanced(groups, 300)
    ids, _ = order.at(3, 4, np.arange(300))
    shares = np.unique(groups[ids], return_counts=True)
    assert shares[0].tolist() == [0, 2, 7]
    assert (np.abs(shares[1] - 100) <= 2).all()
    # 70 samples share the 100 places of the first group: each comes once or more, none often.
    assert np.bincount(ids[groups[ids] == 0], minlength=110)[groups == 0].max() <= 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_world_size_draws_the_same_by_weights(world_size: int) -> None:
    order = EpochOrder.balanced(np.arange(100) % 3, 60)
    whole = order.at(5, 2, np.arange(12, 24))
    for rank in range(world_size):
        share = rank_slice(12, rank, world_size)
        part = order.at(5, 2, np.arange(12 + share.start, 12 + share.stop))
        assert all(np.array_equal(mine, all_[share]) for mine, all_ in zip(part, whole))


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, np.nan], [1, np.inf]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite, not negative, and some above 0"):
        EpochOrder.weighted(np.array(weights), 2)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 10 does not divide by 4 processes"):
        rank_slice(10, 0, 4)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_the_data_set_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 10\)"):
        permute(0, 0, position, 10)


def test_the_order_of_old_runs_stays_what_it_was() -> None:
    """Resuming a run with another order would repeat and skip samples: never change these."""
    assert permute(42, 3, np.arange(8), 1000).tolist() == [829, 957, 469, 935, 882, 154, 522, 831]
    # ImageNet-1k, a third of whose domain of 2**22 it fills.
    assert permute(42, 3, np.arange(4), 1_281_167).tolist() == [54422, 902265, 623911, 128040]
    assert permute(2**63, 0, np.arange(3), 45).tolist() == [22, 26, 24]
