import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from common.errors import ConfigError
from trainer.features import k_means as module
from trainer.features.k_means import k_means


def blobs(count: int = 400, classes: int = 5, noise: float = 1.0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(2)
    centres = 3 * torch.randn(classes, 6, generator=rng)
    labels = torch.randint(classes, (count,), generator=rng)
    return centres[labels] + noise * torch.randn(count, 6, generator=rng), labels


def test_clusters_are_as_tight_as_scikit_learns() -> None:
    x, _ = blobs(noise=3.0)  # no clear groups: there are many local minima
    ours = k_means(x, 8, restarts=10)
    theirs = KMeans(8, n_init=10, random_state=0).fit(x.numpy())
    assert ours.inertia <= 1.02 * theirs.inertia_
    assert ours.converged


def test_clear_groups_are_found() -> None:
    x, labels = blobs()
    assert adjusted_rand_score(labels, k_means(x, 5).assigned_N) > 0.95


def test_lloyd_goes_where_scikit_learn_goes_from_the_same_start() -> None:
    x, _ = blobs(noise=2.0)
    start = x[[0, 7, 50, 90]]
    ours = module._lloyd(x, start)
    theirs = KMeans(4, init=start.numpy(), n_init=1, tol=0, max_iter=300).fit(x.numpy())
    assert torch.equal(ours.assigned_N, torch.from_numpy(theirs.labels_).long())
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_the_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs(noise=3.0)
    once = k_means(x, 6, seed=3, restarts=2)
    assert torch.equal(k_means(x, 6, seed=3, restarts=2).assigned_N, once.assigned_N)
    assert not torch.equal(k_means(x, 6, seed=4, restarts=1).assigned_N, once.assigned_N)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 144 * 50)  # blocks of 50 rows
    assert torch.equal(k_means(x, 6, seed=3, restarts=2).assigned_N, once.assigned_N)


def test_a_cluster_that_loses_all_its_samples_starts_anew() -> None:
    x = torch.tensor([[0.0], [0.1], [10.0], [10.1], [50.0]])
    found = module._lloyd(x, torch.tensor([[0.0], [0.0], [0.0]]))
    assert sorted(found.assigned_N.bincount(minlength=3).tolist()) == [1, 2, 2]


def test_equal_samples_are_no_obstacle_and_no_cluster() -> None:
    found = k_means(torch.ones(6, 3), 3)
    assert found.inertia == 0.0
    assert found.found == 1
    assert k_means(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(5, 1), 5).found == 2
    assert k_means(blobs()[0], 5).found == 5


@pytest.mark.parametrize("clusters", [0, 401])
def test_impossible_numbers_of_clusters_are_refused(clusters: int) -> None:
    with pytest.raises(ConfigError, match=f"--k {clusters}"):
        k_means(blobs()[0], clusters)
