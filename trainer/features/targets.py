"""Several labels of an image, or numbers, from features, and how well.

Shape suffixes: N samples of the training set, M of the test set, T targets, F features, K
neighbours.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from data_pipeline.reading.order import permute
from trainer.features.neighbours import nearest_rows

Table = npt.NDArray[np.float64]
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_PENALTIES = np.logspace(-2, 5, 15)
_HELD_OUT = 0.2


def neighbours(
    k: int,
    temperature: float,
    train_NF: torch.Tensor,
    test_MF: torch.Tensor,
    known_NT: Table,
    device: torch.device,
) -> Table:
    """Means ``(M, T)`` of what is known of the nearest, with weights exp(cosine similarity /
    temperature); where nothing is, of all.

    Args:
        k: neighbours.
        temperature: of the weights.
        train_NF: features; ``test_MF`` too.
        known_NT: NaN where unknown.
        device: where to compare.
    """
    similarity_MK, index_MK = nearest_rows(train_NF, test_MF, min(k, len(train_NF)), device=device)
    weight_MK = ((similarity_MK - similarity_MK[:, :1]).double() / temperature).exp()
    near_MKT = known_NT[index_MK.cpu().numpy()]
    weight_MKT = np.where(np.isnan(near_MKT), 0.0, weight_MK.cpu().numpy()[..., None])
    total_MT = weight_MKT.sum(1)
    sums_MT = (weight_MKT * np.nan_to_num(near_MKT)).sum(1)
    means_MT = sums_MT / np.where(total_MT > 0, total_MT, 1.0)
    found: Table = np.where(total_MT > 0, means_MT, np.nanmean(known_NT, 0))
    return found


def linear(
    c: float | None,
    seed: int,
    train_NF: torch.Tensor,
    test_MF: torch.Tensor,
    known_NT: Table,
    are_labels: bool,
) -> tuple[Table, dict[str, Any]]:
    """Log odds of labels by logistic regression, or numbers by ridge regression, ``(M, T)``, and
    what was chosen.

    Args:
        c: inverse strength of L2, of labels; None: chosen on held-out samples.
        seed: of those.
        train_NF: features; ``test_MF`` too.
        known_NT: NaN where unknown.
        are_labels: whether targets are 0 or 1.
    """
    scaler = StandardScaler()
    x_NF = scaler.fit_transform(train_NF.double().numpy())
    x_MF = scaler.transform(test_MF.double().numpy())
    if not are_labels:
        fits = [_ridge(x_NF, known_N, x_MF) for known_N in known_NT.T]
        chosen = {"penalties": [penalty for _, penalty in fits]}
        return np.stack([found for found, _ in fits], 1), chosen
    held = permute(seed, 0, np.arange(round(_HELD_OUT * len(x_NF))), len(x_NF))
    kept = np.setdiff1d(np.arange(len(x_NF)), held)
    if c is None:
        reached = {
            strength: _mean_precision(
                _logistic(x_NF[kept], known_NT[kept], x_NF[held], strength), known_NT[held]
            )
            for strength in _STRENGTHS
        }
        c = max(reached, key=lambda strength: reached[strength])
    return _logistic(x_NF, known_NT, x_MF, c), {"c": c}


def _ridge(x_NF: Table, known_N: Table, x_MF: Table) -> tuple[Table, float | None]:
    is_known = ~np.isnan(known_N)
    if not is_known.any():
        return np.full(len(x_MF), np.nan), None
    model = RidgeCV(alphas=_PENALTIES).fit(x_NF[is_known], known_N[is_known])
    return model.predict(x_MF), float(model.alpha_)


def _logistic(x_NF: Table, known_NT: Table, x_MF: Table, c: float) -> Table:
    """Log odds; of a label that all images have, or none, a constant."""
    found = np.zeros((len(x_MF), known_NT.shape[1]))
    for target, known_N in enumerate(known_NT.T):
        is_known = ~np.isnan(known_N)
        if len(np.unique(known_N[is_known])) > 1:
            model = LogisticRegression(C=c, max_iter=1000)
            model.fit(x_NF[is_known], known_N[is_known])
            found[:, target] = model.decision_function(x_MF)
    return found


def precision_of(scores_M: Table, known_M: Table) -> float:
    """NaN where all images that are known have a label, or none has."""
    is_known = ~np.isnan(known_M)
    if len(np.unique(known_M[is_known])) < 2:
        return float("nan")
    return float(average_precision_score(known_M[is_known], scores_M[is_known]))


def _mean_precision(scores_MT: Table, known_MT: Table) -> float:
    found = [precision_of(*each) for each in zip(scores_MT.T, known_MT.T)]
    judged = [each for each in found if each == each]
    return float(np.mean(judged)) if judged else 0.0
