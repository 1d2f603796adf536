"""Multinomial logistic regression on frozen features: full batch, L2, to convergence.

Minimises  ``C * sum_i cross_entropy_i + |W|^2 / 2``  over weights W and an unpenalised bias, on
features standardised by the training set. scikit-learn's ``LogisticRegression`` has the same
objective and the same meaning of ``C``. L-BFGS (Nocedal & Wright, chapter 7) in float64.

Shape suffixes: N training samples, B rows of a block, F features, C classes.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import ConfigError, DataError
from trainer.features.extraction import Features
from trainer.features.labels import Accuracy, accuracy_of, class_count, hold_out

STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
"""Of C, tried in this order."""
_HELD_OUT = 0.2
_PATIENCE = 2  # values of C without a better one
_SEARCH_TOLERANCE, _SEARCH_ITERATIONS = 1e-4, 200
_BLOCK_BYTES = 64 << 20  # of float64 features and logits at once


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """How to fit."""

    c: float | None = None
    """Inverse strength of the penalty; None: the best of ``STRENGTHS`` on held-out samples."""
    max_iterations: int = 1000  # of L-BFGS
    gradient_tolerance: float = 1e-5
    """Fit until no component of the gradient of the mean objective is larger."""
    seed: int = 0  # of the split that C is chosen on

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.c is not None and not self.c > 0:
            raise ConfigError(f"logistic regression: C={self.c} must be above 0")


@dataclass(frozen=True)
class LogisticModel:
    """A fitted classifier: logits are ``standardised features @ weight.T + bias``."""

    weight_CF: torch.Tensor  # float64, for standardised features  # noqa: N815
    bias_C: torch.Tensor  # noqa: N815
    mean_F: torch.Tensor  # noqa: N815
    scale_F: torch.Tensor  # noqa: N815
    iterations: int
    largest_gradient: float

    def logits(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Float64 (B, C) on the model's device."""
        x_BF = features_BF.to(self.weight_CF)
        return ((x_BF - self.mean_F) / self.scale_F) @ self.weight_CF.T + self.bias_C


@dataclass(frozen=True)
class LogisticResult:
    """Accuracy on the test set, as fractions in [0, 1], and the classifier."""

    top1: float
    top5: float
    """Within the best ``min(5, classes)``."""
    c: float
    chosen_on: int
    """Held-out samples that C was chosen on; 0 where it was given or nothing could be spared."""
    converged: bool
    model: LogisticModel


def logistic_regression(
    train: Features,
    test: Features,
    config: LogisticConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> LogisticResult:
    """Choose C if it is not given, fit on all of ``train``, test on ``test``. No collectives.

    C is chosen by accuracy on a fifth of the training samples (seeded, by class), the larger
    likelihood deciding between equals; the test set has no part in it. The search goes from strong
    to weak penalties and ends after two in a row that are no better. With one sample in every class
    nothing can be held out and C is 1.

    Raises:
        DataError: a set is empty or not labelled, or the training set holds one class only.
    """
    config = config or LogisticConfig()
    device = torch.device(device)
    num_classes = class_count(train.labels_N, test.labels_N)
    if len(train.labels_N.unique()) < 2:
        raise DataError("the training set holds one class only: a classifier needs two")
    c, chosen_on = config.c, 0
    if c is None:
        c, chosen_on = _choose_strength(train, num_classes, config, device)
    model = fit_logistic(train, num_classes, c, config, device)
    top1, top5 = _accuracy(model, test)
    converged = model.largest_gradient <= config.gradient_tolerance
    return LogisticResult(top1, top5, c, chosen_on, converged, model)


def fit_logistic(
    train: Features,
    num_classes: int,
    c: float,
    config: LogisticConfig,
    device: torch.device,
    start: LogisticModel | None = None,
) -> LogisticModel:
    """Fit at one ``c``, from zero or from another fit's weights."""
    x_NF = train.features_NF.to(device)
    scale_F, mean_F = torch.std_mean(x_NF.double(), dim=0, correction=0)
    # A feature that does not vary says nothing; dividing by its rounding error would make it shout.
    scale_F = torch.where(scale_F > 1e-7 * (1 + mean_F.abs()), scale_F, torch.ones_like(scale_F))
    x_NF, labels_N = (x_NF - mean_F.float()) / scale_F.float(), train.labels_N.to(device)
    width = x_NF.shape[1]
    weight_CF = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
    bias_C = torch.zeros(num_classes, dtype=torch.float64, device=device)
    if start is not None:
        weight_CF.copy_(start.weight_CF)
        bias_C.copy_(start.bias_C)
    parameters = weight_CF.requires_grad_(), bias_C.requires_grad_()
    rows = _rows(width, num_classes)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=config.max_iterations,
        max_eval=2 * config.max_iterations,
        history_size=20,
        tolerance_grad=config.gradient_tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def mean_objective() -> torch.Tensor:
        """And its gradients, in blocks of rows: memory stays bounded."""
        optimizer.zero_grad()
        loss = weight_CF.square().sum() / (2 * c * len(labels_N))
        loss.backward()
        for x_BF, labels_B in zip(x_NF.split(rows), labels_N.split(rows)):
            logits_BC = x_BF.double() @ weight_CF.T + bias_C
            part = nn.functional.cross_entropy(logits_BC, labels_B, reduction="sum") / len(x_NF)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(mean_objective)
    mean_objective()
    return LogisticModel(
        weight_CF.detach(),
        bias_C.detach(),
        mean_F,
        scale_F,
        iterations=int(optimizer.state[weight_CF]["n_iter"]),
        largest_gradient=max(p.grad.abs().max().item() for p in parameters if p.grad is not None),
    )


def _choose_strength(
    train: Features, num_classes: int, config: LogisticConfig, device: torch.device
) -> tuple[float, int]:
    kept, held = hold_out(train.labels_N, _HELD_OUT, config.seed)
    if len(held) == 0:
        return 1.0, 0
    rough = dataclasses.replace(
        config,
        gradient_tolerance=max(_SEARCH_TOLERANCE, config.gradient_tolerance),
        max_iterations=min(_SEARCH_ITERATIONS, config.max_iterations),
    )
    fitted: LogisticModel | None = None
    best, place = (-1.0, -float("inf")), 0
    for i, c in enumerate(STRENGTHS):  # each fit starts where the last one ended
        fitted = fit_logistic(train.take(kept), num_classes, c, rough, device, fitted)
        reached = _accuracy(fitted, train.take(held)).top1
        likelihood = _log_likelihood(fitted, train.take(held))
        if (reached, likelihood) > best:
            best, place = (reached, likelihood), i
        elif i - place == _PATIENCE:
            break
    return STRENGTHS[place], len(held)


def _rows(width: int, classes: int) -> int:
    """Of a block, which is to be small enough in float64."""
    return max(1, _BLOCK_BYTES // (8 * (width + 2 * classes)))


def _accuracy(model: LogisticModel, test: Features) -> Accuracy:
    classes, width = model.weight_CF.shape
    return accuracy_of(model.logits, test, model.bias_C.device, _rows(width, classes))


def _log_likelihood(model: LogisticModel, data: Features) -> float:
    classes, width = model.weight_CF.shape
    total = torch.zeros((), dtype=torch.float64, device=model.bias_C.device)
    for features_BF, labels_B in data.blocks(_rows(width, classes), total.device):
        logits_BC = model.logits(features_BF)
        total -= nn.functional.cross_entropy(logits_BC, labels_B, reduction="sum")
    return total.item()
