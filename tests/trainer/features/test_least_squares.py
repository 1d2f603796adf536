"""A linear classifier by least squares: scikit-learn's ridge, on any number of processes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from tests.dist import run_ranks
from trainer.features.extraction import Features
from trainer.features.least_squares import linear_top1

CLASSES, SIZE = 5, 12


def _data(count: int, seed: int, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + noise * torch.randn(count, SIZE, generator=generator)
    features[:, 3] = 7.0  # never changes
    features[:, 4] = 1e4 + 1e3 * features[:, 4]
    return Features(features, labels, torch.arange(count))


def _on_a_rank(rank: int, world_size: int, noise: float) -> float:
    return linear_top1(_data(301, 0, noise), _data(97, 1, noise), torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_is_ridge_regression_of_standardised_features(world_size: int) -> None:
    train, test = _data(301, 0), _data(97, 1)
    model = Ridge(alpha=SIZE)  # F / N of the mean square is F of the sum
    scaler = StandardScaler()
    x = scaler.fit_transform(train.features_NF.double().numpy())
    model.fit(x, np.eye(CLASSES)[train.labels_N.numpy()])
    found = model.predict(scaler.transform(test.features_NF.double().numpy())).argmax(1)
    expected = float((found == test.labels_N.numpy()).mean())
    assert 0.3 < expected < 0.95, "a control: neither chance nor all"
    assert run_ranks(_on_a_rank, world_size, 1.0) == [expected] * world_size


def test_classes_that_lie_apart_are_told() -> None:
    assert _on_a_rank(0, 1, 0.01) == 1.0


def test_a_class_that_training_never_saw_is_never_right() -> None:
    test = _data(50, 1, 0.01)
    test = test._replace(labels_N=torch.full_like(test.labels_N, CLASSES))
    assert linear_top1(_data(301, 0), test, torch.device("cpu")) == 0.0
