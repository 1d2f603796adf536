"""Multinomial logistic regression on frozen features: scikit-learn's, with a strength chosen here.

Full batch, L2, L-BFGS in float64 to convergence, on features standardised by the training set.

Shape suffixes: N samples, F features, C classes.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from common.errors import DataError
from trainer.features.extraction import Features
from trainer.features.labels import Accuracy, accuracy_of, class_count, hold_out

STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
"""Of C, tried in this order."""
_HELD_OUT = 0.2
_PATIENCE = 2  # values of C without a better one
_SEARCH_TOLERANCE, _SEARCH_ITERATIONS = 1e-4, 200


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """How to fit."""

    c: float | None = None
    """Inverse strength of the penalty; None: the best of ``STRENGTHS`` on held-out samples."""
    max_iterations: int = 1000  # of L-BFGS
    gradient_tolerance: float = 1e-5
    """Fit until no component of the gradient of the mean objective is larger."""
    seed: int = 0  # of the split that C is chosen on


@dataclass(frozen=True)
class LogisticResult:
    """What the test set says of a classifier."""

    reached: Accuracy
    c: float
    chosen_on: int
    """Held-out samples that C was chosen on; 0 where it was given or nothing could be spared."""
    iterations: int
    model: Pipeline
    """scikit-learn's scaler and regression."""


def logistic_regression(
    train: Features, test: Features, config: LogisticConfig | None = None
) -> LogisticResult:
    """Fit on all of ``train``, on the CPU, and measure on ``test``, which nothing is chosen on.

    Raises:
        DataError: a set is empty or not labelled, or the training set holds one class only.
    """
    config = config or LogisticConfig()
    num_classes = class_count(train.labels_N, test.labels_N)
    if len(train.labels_N.unique()) < 2:
        raise DataError("the training set holds one class only: a classifier needs two")
    c, chosen_on = config.c, 0
    if c is None:
        c, chosen_on = _choose_strength(train, config)
    model = _model(config.gradient_tolerance, config.max_iterations)
    _fit(model, train, c)

    def scores(features_BF: torch.Tensor) -> torch.Tensor:
        found = model.decision_function(features_BF.double().numpy())
        if found.ndim == 1:  # of two classes, the second one's alone
            found = np.stack([np.zeros_like(found), found], axis=1)
        # Classes of the test set alone are never predicted.
        scores_BC = torch.full((len(found), num_classes), -torch.inf, dtype=torch.float64)
        scores_BC[:, model.classes_] = torch.from_numpy(found)
        return scores_BC

    reached = accuracy_of(scores, test, torch.device("cpu"))
    return LogisticResult(reached, c, chosen_on, int(model[-1].n_iter_[0]), model)


def _model(tolerance: float, iterations: int) -> Pipeline:
    regression = LogisticRegression(tol=tolerance, max_iter=iterations, warm_start=True)
    return make_pipeline(StandardScaler(), regression)


def _fit(model: Pipeline, data: Features, c: float) -> None:
    """From zero, or from what ``model`` was fitted to before."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        model.set_params(logisticregression__C=c).fit(*_arrays(data))


def _arrays(data: Features) -> tuple[Any, Any]:
    return data.features_NF.double().numpy(), data.labels_N.numpy()


def _choose_strength(train: Features, config: LogisticConfig) -> tuple[float, int]:
    kept, held = hold_out(train.labels_N, _HELD_OUT, config.seed)
    if len(held) == 0:
        return 1.0, 0
    model = _model(
        max(_SEARCH_TOLERANCE, config.gradient_tolerance),
        min(_SEARCH_ITERATIONS, config.max_iterations),
    )
    x_NF, labels_N = _arrays(train.take(held))
    best, place = (-1.0, -float("inf")), 0
    for i, c in enumerate(STRENGTHS):  # each fit starts where the last one ended
        _fit(model, train.take(kept), c)
        likelihood = -log_loss(labels_N, model.predict_proba(x_NF), labels=model.classes_)
        found = (model.score(x_NF, labels_N), likelihood)
        if found > best:
            best, place = found, i
        elif i - place == _PATIENCE:
            break
    return STRENGTHS[place], len(held)
