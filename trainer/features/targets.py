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

from trainer.features.labels import hold_out
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
    scaler = StandardScaler(copy=False)
    x_NF = scaler.fit_transform(train_NF.double().numpy())
    x_MF = scaler.transform(test_MF.double().numpy())
    if not are_labels:
        return _ridge(x_NF, known_NT, x_MF)
    if c is not None:
        return _logistic(x_NF, known_NT, x_MF, c), {"c": c}
    kept, held = (part.numpy() for part in hold_out(_rarest(known_NT), _HELD_OUT, seed))
    reached = {
        strength: _mean_precision(
            _logistic(x_NF[kept], known_NT[kept], x_NF[held], strength), known_NT[held]
        )
        for strength in (_STRENGTHS if len(held) else ())
    }
    judged = {strength: found for strength, found in reached.items() if found == found}
    c = max(judged, key=lambda strength: judged[strength]) if judged else 1.0
    chosen = {"c": c, "c_chosen_on_samples": len(held) if judged else 0}
    return _logistic(x_NF, known_NT, x_MF, c), chosen


def _rarest(known_NT: Table) -> torch.Tensor:
    """Of each sample the label that fewest others have; T where it has none: what a split is to
    share out evenly."""
    counts_T = np.nansum(known_NT, 0)
    rank_NT = np.where(known_NT == 1, counts_T, np.inf)
    found_N = np.where(np.isfinite(rank_NT).any(1), rank_NT.argmin(1), known_NT.shape[1])
    return torch.from_numpy(found_N.astype(np.int64))


def _ridge(x_NF: Table, known_NT: Table, x_MF: Table) -> tuple[Table, dict[str, Any]]:
    """Targets that are known of the same images share one decomposition."""
    found_MT, penalties_T = np.empty((len(x_MF), known_NT.shape[1])), np.empty(known_NT.shape[1])
    is_known_GN, group_T = np.unique(known_NT.T == known_NT.T, axis=0, return_inverse=True)
    for group, is_known_N in enumerate(is_known_GN):
        members = np.flatnonzero(group_T.ravel() == group)
        rows = slice(None) if is_known_N.all() else is_known_N
        model = RidgeCV(alphas=_PENALTIES, alpha_per_target=True)
        model.fit(x_NF[rows], known_NT[rows][:, members])
        found_MT[:, members] = model.predict(x_MF).reshape(len(x_MF), -1)
        penalties_T[members] = model.alpha_
    return found_MT, {"penalties": penalties_T.tolist()}


def _logistic(x_NF: Table, known_NT: Table, x_MF: Table, c: float) -> Table:
    """Log odds; of a label that all images of a part have, or none, a constant."""
    found_MT = np.zeros((len(x_MF), known_NT.shape[1]))
    for target, known_N in enumerate(known_NT.T):
        is_known_N = known_N == known_N
        if len(np.unique(known_N[is_known_N])) > 1:
            rows = slice(None) if is_known_N.all() else is_known_N
            model = LogisticRegression(C=c, max_iter=1000)
            found_MT[:, target] = model.fit(x_NF[rows], known_N[rows]).decision_function(x_MF)
    return found_MT


def precision_of(scores_M: Table, known_M: Table) -> float:
    """NaN where all images that are known have a label, or none has."""
    is_known = ~np.isnan(known_M)
    if len(np.unique(known_M[is_known])) < 2:
        return float("nan")
    return float(average_precision_score(known_M[is_known], scores_M[is_known]))


def _mean_precision(scores_MT: Table, known_MT: Table) -> float:
    found = [precision_of(*each) for each in zip(scores_MT.T, known_MT.T)]
    judged = [each for each in found if each == each]
    return float(np.mean(judged)) if judged else float("nan")
