import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from trainer.evaluation.ranking import rank_all
from trainer.features.extraction import Features


def data(bank: int = 200, asked: int = 40, classes: int = 6) -> tuple[Features, Features]:
    rng = torch.Generator().manual_seed(5)
    centres = torch.randn(classes, 12, generator=rng)
    labels = torch.randint(classes, (bank + asked,), generator=rng)
    x = centres[labels] + 2.0 * torch.randn(bank + asked, 12, generator=rng)
    return table(x[:bank], labels[:bank]), table(x[bank:], labels[bank:])


def table(x: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(x, labels, torch.arange(len(labels)))


def test_mean_average_precision_equals_scikit_learns() -> None:
    bank, asked = data()
    bank_labels, labels = bank.labels_N, asked.labels_N
    ranking = rank_all(bank, asked, (1, 5))
    assert ranking is not None
    unit_bank, unit_asked = (
        torch.nn.functional.normalize(x.features_NF, dim=1).double() for x in (bank, asked)
    )
    scores = (unit_asked @ unit_bank.T).numpy()
    theirs = [
        average_precision_score((bank_labels == label).numpy(), row)
        for label, row in zip(labels, scores)
    ]
    assert ranking.mean_average_precision == pytest.approx(np.mean(theirs), abs=1e-6)
    nearest = bank_labels.numpy()[np.argsort(-scores, axis=1)]
    hit = nearest == labels.numpy()[:, None]
    assert ranking.recall_at == pytest.approx(
        {1: hit[:, 0].mean(), 5: hit[:, :5].any(axis=1).mean()}
    )
    assert ranking.precision_at == pytest.approx({1: hit[:, 0].mean(), 5: hit[:, :5].mean()})
    assert 0.2 < ranking.mean_average_precision < 0.9


def test_a_query_does_not_find_itself() -> None:
    bank, _ = data()
    labels = bank.labels_N
    ranking = rank_all(bank, bank, (1,), itself_M=torch.arange(200))
    assert ranking is not None
    scores = torch.nn.functional.normalize(bank.features_NF.double(), dim=1)
    scores = scores @ scores.T
    others = ~torch.eye(200, dtype=torch.bool)
    theirs = [
        average_precision_score((labels == labels[i])[others[i]], scores[i][others[i]])
        for i in range(200)
    ]
    assert ranking.mean_average_precision == pytest.approx(np.mean(theirs), abs=1e-6)
    assert ranking.recall_at[1] < 1.0


def test_queries_with_nothing_to_be_found_are_counted_and_left_out() -> None:
    bank, asked = data()
    some = asked.labels_N.clone()
    some[:3], some[3] = -1, 99
    ranking = rank_all(bank, asked._replace(labels_N=some), (1,))
    rest = rank_all(bank, asked.take(torch.arange(4, 40)), (1,))
    assert ranking is not None and rest is not None
    assert (ranking.queries, ranking.left_out) == (36, 4)
    assert ranking.mean_average_precision == pytest.approx(rest.mean_average_precision, abs=1e-12)
    unlabelled = asked._replace(labels_N=torch.full_like(some, -1))
    assert rank_all(bank, unlabelled, (1,)) is None


def test_unlabelled_images_are_relevant_to_nobody() -> None:
    bank = table(torch.eye(3), torch.tensor([-1, 0, -1]))
    found = rank_all(bank, table(torch.eye(3)[:1], torch.tensor([0])), (1, 2, 3))
    assert found is not None
    assert found.mean_average_precision == pytest.approx(0.5)
    assert found.recall_at == {1: 0.0, 2: 1.0, 3: 1.0}
