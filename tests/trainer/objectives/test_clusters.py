"""Clusters of a whole data set that processes hold parts of: k-means, whitening, equal shares; and
what DeepCluster and SeLa make of them."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from common.errors import ConfigError, NumericalError
from tests.dist import run_ranks
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.deepcluster import DeepCluster, DeepClusterConfig
from trainer.objectives.joint import JointConfig, TaskConfig
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.parts.fresh_linear import FreshLinear
from trainer.objectives.parts.k_means import k_means, nearest
from trainer.objectives.parts.shared_out import EQUAL, shared_out
from trainer.objectives.parts.whitening import whitened
from trainer.objectives.sela import SeLa, SeLaConfig

ROWS, DIM = 101, 5


def _rows(count: int = ROWS, dim: int = DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def _own(rows: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Every process has another number of them."""
    cuts = [int(len(rows) * (r / world_size) ** 2) for r in range(world_size + 1)]
    return rows[cuts[rank] : cuts[rank + 1]]


# --- k-means ---


def _lloyd(rows: torch.Tensor, centres: torch.Tensor, spherical: bool) -> Any:
    """One row, one cluster after another."""
    errors = []
    for iteration in range(7):
        of = [int((row - centres).square().sum(1).argmin()) for row in rows]
        errors.append(sum(float((row - centres[k]).square().sum()) for row, k in zip(rows, of)))
        if iteration < 6:
            means = [
                rows[[n for n, k in enumerate(of) if k == each]].mean(0)
                for each in range(len(centres))
            ]
            centres = torch.stack([normalize(m, dim=0) if spherical else m for m in means])
    return centres, of, errors


def _clustered(rank: int, world_size: int, spherical: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = normalize(_rows(), dim=1) if spherical else _rows()
    centres, found = k_means(
        _own(rows, rank, world_size), rows[[3, 50, 7, 20]], 6, spherical=spherical
    )
    return centres, found


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_clusters_are_lloyds_on_any_number_of_processes(world_size: int, spherical: bool) -> None:
    rows = normalize(_rows(), dim=1) if spherical else _rows()
    centres, closest, errors = _lloyd(rows, rows[[3, 50, 7, 20]], spherical)
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    ranks = run_ranks(_clustered, world_size, spherical)
    for found, _ in ranks:
        torch.testing.assert_close(found, centres, rtol=1e-12, atol=1e-12)
    assert torch.cat([assigned for _, assigned in ranks]).tolist() == closest


def test_a_cluster_without_rows_keeps_its_centre() -> None:
    rows = normalize(_rows()[:, :4].abs(), dim=1)
    lonely = -torch.ones(1, 4, dtype=torch.float64) / 2  # far from every row
    found, assigned = k_means(rows, torch.cat([rows[:2], lonely]), 5, spherical=True)
    assert torch.equal(found[2:], lonely)
    assert set(assigned.tolist()) == {0, 1}


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_the_first_of_equally_near_centres_is_taken(count: int) -> None:
    """Small whole numbers, which no order of additions rounds: every distance comes many times."""
    rows, centres = (_rows(n, 2).mul(2).round() for n in (ROWS, count))
    distances = (rows[:, None] - centres).square().sum(2)
    assert nearest(rows, centres).tolist() == distances.argmin(1).tolist()
    assert nearest(rows[:0], centres).shape == (0,)
    assert count == 1 or (distances == distances.amin(1, keepdim=True)).sum(1).max() > 1


# --- whitening ---


def _whitened(rank: int, world_size: int) -> torch.Tensor:
    rows = _rows(60, 8) @ _rows(8, 8) + 3
    return whitened(_own(rows, rank, world_size).split(7), 4)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_components_are_those_of_all_rows(world_size: int) -> None:
    """But for their signs, which change no distance."""
    rows = _rows(60, 8) @ _rows(8, 8) + 3
    left, _, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    scores = left[:, :4] * math.sqrt(60)
    # Variance 1 and no covariance, before rows get unit length.
    torch.testing.assert_close(scores.T @ scores / 60, torch.eye(4, dtype=torch.float64))
    expected = normalize(scores, dim=1)
    found = torch.cat(run_ranks(_whitened, world_size))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-9, atol=1e-9)


def test_a_feature_that_never_changes_is_no_component() -> None:
    rows = torch.cat([_rows(60, 2), torch.full((60, 2), 7.0, dtype=torch.float64)], 1).float()
    found = whitened([rows], 4)
    assert (found.abs().amax(0) > 0).sum() == 2
    torch.testing.assert_close(found.norm(dim=1), torch.ones(60))


# --- equal shares ---


def _plain_shares(logits: torch.Tensor, iterations: int) -> torch.Tensor:
    """Sinkhorn's algorithm on the whole matrix, by logarithms."""
    for _ in range(iterations):
        logits = logits.log_softmax(1)
        shares = logits.exp().sum(0) * logits.shape[1] / len(logits)
        if (shares - 1).abs().max() < EQUAL:
            break
        logits = logits - shares.log()
    return logits.argmax(1)


def _shared(rank: int, world_size: int) -> torch.Tensor:
    rows = normalize(_rows() + 0.7, dim=1)
    return shared_out(_own(rows, rank, world_size), rows[:6], 250.0, 200)


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_labels_have_equal_shares_on_any_number_of_processes(world_size: int) -> None:
    rows = normalize(_rows() + 0.7, dim=1)
    nearest = Counter((rows @ rows[:6].T).argmax(1).tolist())
    found = torch.cat(run_ranks(_shared, world_size))
    assert torch.equal(found, _plain_shares(250 * (rows @ rows[:6].T), 200))
    counts = Counter(found.tolist())
    assert max(nearest.values()) > 2 * ROWS / 6 > ROWS / 12 > min(nearest.values()), "a control"
    # A tenth off, and of each prototype one row or two that lie between.
    assert all(abs(counts[each] - ROWS / 6) < EQUAL * ROWS / 6 + 2 for each in range(6)), counts


def test_equal_shares_of_opposite_rows_are_finite() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat_interleave(torch.tensor([9, 1]), 0)
    found = shared_out(rows, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 350.0, 50)
    assert len(found.unique()) == 2


# --- objectives ---

SAMPLES, IMAGES, KINDS = 40, 8, 5


def _encoder() -> Any:
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    return encoder


def _deepcluster(**settings: Any) -> DeepCluster:
    config = DeepClusterConfig(clusters=KINDS, components=4, iterations=3, **settings)
    given = Given(seed=3, num_samples=SAMPLES)
    return config.build(_encoder(), HeadConfig(), given).double()


def _batches(objective: Any, views: int = 1) -> Any:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, views, 3, 32, 32, generator=generator, dtype=torch.float64)
    for ids in torch.arange(SAMPLES).split(IMAGES):
        shown = images[ids].transpose(0, 1)
        with torch.no_grad():
            yield objective(Inputs((shown,), ids, ids != 17))


def test_an_epoch_shows_every_cluster_as_often_and_no_stand_in() -> None:
    objective = _deepcluster()
    assert objective.order(SAMPLES) is None, "nothing has been clustered"
    objective.before_epoch(0, lambda: _batches(objective))
    clusters = objective.clusters.tolist()
    assert [sample for sample in range(SAMPLES) if clusters[sample] < 0] == [17]
    order = objective.order(200)
    assert order is not None
    shown, _ = order.at(0, 0, range(200))
    counts = Counter(clusters[sample] for sample in shown.tolist())
    assert sorted(counts) == list(range(KINDS))
    assert all(abs(count - 200 / KINDS) <= 2 for count in counts.values())
    sizes = Counter(c for c in clusters if c >= 0)
    assert max(sizes.values()) > min(sizes.values()) + 2, "a control: they are of all sizes"


def test_the_classifier_starts_anew_and_its_parameters_go_on() -> None:
    objective = _deepcluster()
    layer = objective.classifier
    objective.before_epoch(0, lambda: _batches(objective))
    first = layer.weight_offset.clone()
    turn = int(layer.turn)
    assert 0.008 < float(first.std()) < 0.012
    with torch.no_grad():
        layer.weight += 5
        layer.bias += 3
    kept = layer.weight.clone()
    objective.before_epoch(1, lambda: _batches(objective))
    assert torch.equal(layer.weight, kept)
    rows = _rows(3, layer.weight.shape[2])
    logits = layer(rows)
    assert float(logits.detach().abs().max()) < 1, "what it has learnt is forgotten, its bias too"
    assert not torch.allclose(layer.weight[1 - turn] + layer.weight_offset, first)
    logits.sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None and not gradient[turn].any(), "the other set rests"
    torch.testing.assert_close(gradient[1 - turn], rows.sum(0).expand_as(first))


def test_what_an_optimizer_remembers_dies_away_before_a_set_learns_again() -> None:
    layer = FreshLinear(4, 3).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def train(steps: int, goal: float) -> torch.Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            ((layer(_rows(7, 4)) - goal) ** 2).mean().backward()
            optimizer.step()
        momentum: torch.Tensor = optimizer.state[layer.weight]["momentum_buffer"]
        return momentum.abs().amax((1, 2)).clone()

    layer.start(_rows(3, 4))
    learning = int(layer.turn)
    before = train(3, 50.0)[learning]
    layer.start(_rows(3, 4))
    after = train(60, -5.0)
    layer.start(_rows(3, 4))
    assert int(layer.turn) == learning
    assert float(before) > 1 and float(after[learning]) < 1.001 * float(before) * 0.9**60


def test_a_layer_is_torchs_from_where_it_started() -> None:
    layer, weight = FreshLinear(4, 3).double(), _rows(3, 4)
    layer.start(weight)
    torch.testing.assert_close(layer(_rows(7, 4)), _rows(7, 4) @ weight.T)


def test_features_that_are_not_finite_are_named() -> None:
    rows = _rows()
    rows[3, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"not finite; lower --optim.base-lr"):
        whitened([rows], 2)


def test_more_clusters_than_samples_are_refused() -> None:
    config = DeepClusterConfig(clusters=50)
    with pytest.raises(ConfigError, match=r"--objective.clusters 50 is more than the 40 samples"):
        config.build(_encoder(), HeadConfig(), Given(num_samples=40))


def test_beside_a_memory_bank_an_uneven_epoch_is_refused() -> None:
    tasks = (TaskConfig(task=DeepClusterConfig(clusters=5)), TaskConfig(task=NPIDConfig()))
    given = Given(num_samples=40)
    with pytest.raises(ConfigError, match=r"npid needs every sample once, and deepcluster shows"):
        JointConfig(tasks=tasks).build(_encoder(), HeadConfig(), given)


def _sela(**settings: Any) -> SeLa:
    config = SeLaConfig(prototypes=KINDS, heads=2, small_views=0, **settings)
    head = HeadConfig(layers=1, out_dim=16, last_norm="none")
    given = Given(seed=3, num_samples=SAMPLES)
    return config.build(_encoder(), head, given).double()


def test_selas_loss_is_the_mean_over_views_heads_and_labelled_images() -> None:
    objective = _sela()
    objective.before_epoch(0, lambda: _batches(objective, views=2))
    outputs = next(_batches(objective, views=2))
    objective.clusters[:, 2] = -1
    labels, cosines = objective.clusters, outputs.rows["cosines"]
    losses = [
        -(cosines[n, h, v] / 0.1).log_softmax(0)[labels[h, n]]
        for n in range(IMAGES)
        for h in range(2)
        for v in range(2)
        if n != 2
    ]
    found = objective.loss(Outputs(outputs.rows, outputs.fixed), 0).value
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_selas_labels_are_shared_out_and_its_prototypes_learn() -> None:
    objective = _sela()
    objective.before_epoch(0, lambda: _batches(objective, views=2))
    for labels in objective.clusters:
        counts = Counter(label for label in labels.tolist() if label >= 0)
        assert sum(counts.values()) == SAMPLES - 1
        assert all(abs(counts[k] - SAMPLES / KINDS) < 4 for k in range(KINDS)), counts
    outputs = objective(
        Inputs((torch.randn(2, 4, 3, 32, 32).double(),), torch.arange(4), torch.ones(4).bool())
    )
    objective.loss(outputs, 0).value.backward()
    assert all(each.weight.grad.abs().sum() > 0 for each in objective.prototypes)


def test_shares_that_no_number_could_hold_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--objective.sharpness 40 over .*temperature 0.1 is more"
    ):
        SeLaConfig(sharpness=40.0)
