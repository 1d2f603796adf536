import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from common.errors import ConfigError, DataError
from trainer.evaluation.knn import KnnConfig
from trainer.features import neighbours
from trainer.features.extraction import Features
from trainer.features.knn import knn_classify, knn_classify_each
from trainer.features.online_knn import OnlineKnnConfig

TEMPERATURE = 0.07


def clusters(
    n_train: int = 600, n_test: int = 150, classes: int = 7, noise: float = 2.5
) -> tuple[Features, Features]:
    rng = torch.Generator().manual_seed(3)
    centres = torch.randn(classes, 16, generator=rng)
    labels = torch.randint(classes, (n_train + n_test,), generator=rng)
    x = centres[labels] + noise * torch.randn(n_train + n_test, 16, generator=rng)
    return table(x[:n_train], labels[:n_train]), table(x[n_train:], labels[n_train:])


def table(x: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(x, labels, torch.arange(len(labels)))


def sklearn_classifier(train: Features, k: int) -> KNeighborsClassifier:
    model = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    )
    return model.fit(train.features_NF.double().numpy(), train.labels_N.numpy())


@pytest.mark.parametrize("k", [1, 20, 200])
def test_accuracy_equals_scikit_learns_weighted_cosine_neighbours(k: int) -> None:
    train, test = clusters()
    result = knn_classify(train, test, k)
    votes = sklearn_classifier(train, k).predict_proba(test.features_NF.double().numpy())
    best = np.argsort(-votes, axis=1, kind="stable")[:, :5]
    hit = (best == test.labels_N.numpy()[:, None]) & (np.take_along_axis(votes, best, 1) > 0)
    assert result.top1 == pytest.approx(hit[:, 0].mean(), abs=1e-12)
    assert result.top5 == pytest.approx(hit.any(axis=1).mean(), abs=1e-12)
    assert 0.3 < result.top1 < 0.95  # neither chance nor trivial


def test_several_k_in_one_pass_are_what_each_is_alone() -> None:
    data, ks = clusters(), [20, 1, 200, 5, 1000]
    together = knn_classify_each(*data, ks, block=(64, 100))
    assert together == [knn_classify(*data, k=k) for k in ks]
    assert len({result.top1 for result in together}) > 2


@pytest.mark.parametrize("block", [(150, 1), (7, 13), (64, 599), (1000, 1000)])
def test_the_result_does_not_depend_on_the_blocks(block: tuple[int, int]) -> None:
    data = clusters()
    assert knn_classify(*data, k=30, block=block) == knn_classify(*data, k=30)


def test_of_equally_near_neighbours_the_first_ones_vote() -> None:
    # Eight copies of one training sample, their classes alternating; only three may vote.
    train = table(torch.ones(8, 4), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]))
    result = knn_classify(train, table(torch.ones(1, 4), torch.tensor([1])), k=3, block=(1, 2))
    assert result.top1 == 1.0


def test_classes_with_equal_votes_rank_by_their_number() -> None:
    train = table(torch.ones(2, 4), torch.tensor([1, 0]))
    assert knn_classify(train, table(torch.ones(1, 4), torch.tensor([0])), k=2).top1 == 1.0


def test_negative_and_zero_similarities_keep_their_order() -> None:
    x = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [-0.5, 1.0], [0.0, 0.0]])
    train, asked = table(x, torch.tensor([0, 1, 2, 3])), torch.tensor([[1.0, 0.0]])
    # Similarities -1, 0, -0.45, 0: the first zero is nearest.
    assert knn_classify(train, table(asked, torch.tensor([1])), k=1).top1 == 1.0
    # All vote; the one at -1 is the least of four.
    result = knn_classify(train, table(asked, torch.tensor([0])), k=4, temperature=1.0)
    assert (result.top1, result.top5) == (0.0, 1.0)


def test_keys_sort_as_similarities_and_ties_by_the_earlier_sample() -> None:
    similarity = torch.tensor([[0.5, -1.0, -0.0, 0.0, 1.0, -0.5, 0.0, -1e-30, 0.5]])
    keys = neighbours.sortable(similarity, first=100)
    ordered = similarity.sort(descending=True, stable=True)
    values, indices = neighbours.read_keys(keys.sort(descending=True).values)
    assert torch.equal(values, ordered.values)
    assert torch.equal(indices, ordered.indices + 100)


def test_a_neighbour_too_far_to_weigh_anything_still_makes_its_class_a_prediction() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    train, test = table(x, torch.tensor([1, 2])), table(x[:1], torch.tensor([2]))
    result = knn_classify(train, test, k=2, temperature=1e-3)
    assert (result.top1, result.top5) == (0.0, 1.0)


def test_a_class_that_no_neighbour_has_is_no_prediction() -> None:
    train = table(torch.eye(6), torch.arange(6))
    test = table(torch.eye(6)[[5]], torch.tensor([0]))
    assert knn_classify(train, test, k=2).top5 == 1.0  # 0 ties into place 2
    assert knn_classify(train, test, k=1).top5 == 0.0


def test_a_very_small_temperature_is_the_nearest_neighbour() -> None:
    data = clusters()
    sharp = knn_classify(*data, k=200, temperature=1e-6)
    assert sharp.top1 == knn_classify(*data, k=1).top1


def test_few_classes_and_few_training_samples() -> None:
    result = knn_classify(*clusters(n_train=50, classes=3))
    assert (result.k, result.requested_k) == (50, 200)
    assert result.top5 == 1.0


def test_bfloat16_autocast_and_reduced_matmul_precision_change_nothing() -> None:
    data = clusters()
    plain = knn_classify(*data, k=30)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert knn_classify(*data, k=30) == plain
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_nearest_rows_come_in_the_order_of_the_askers() -> None:
    train, test = (each.features_NF for each in clusters(n_test=300))  # three blocks
    similarity, index = neighbours.nearest_rows(train, test, 4, device="cpu")
    whole = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    torch.testing.assert_close(similarity, whole.topk(4).values)
    torch.testing.assert_close(whole.gather(1, index), similarity)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"k": (20, 0)}, "--k 20 0"), ({"temperature": 0.0}, "--temperature 0")],
)
def test_settings_out_of_range_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KnnConfig(source="run", train=(), test=(), **settings)


def test_samples_without_labels_are_refused() -> None:
    train, test = clusters()
    with pytest.raises(DataError, match="no labels"):
        knn_classify(train._replace(labels_N=torch.full_like(train.labels_N, -1)), test)
    with pytest.raises(DataError, match="no samples"):
        knn_classify(train, test.take(torch.arange(0)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"k": 0}, "--knn.k 0"),
        ({"batch": 0}, "--knn.batch 0"),
        ({"resize": 0}, "--knn.resize 0"),
        ({"size": 0}, "--knn.size 0"),
        ({"temperature": 0.0}, "--knn.temperature 0.0"),
        ({"every_epochs": -1}, "--knn.every-epochs -1"),
    ],
    ids=str,
)
def test_a_run_does_not_start_with_an_evaluation_that_cannot_work(
    settings: dict, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        OnlineKnnConfig(**settings)
