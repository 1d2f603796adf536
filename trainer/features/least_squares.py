"""A linear classifier of features by least squares: what is linearly there, in closed form.

Ridge regression of classes as 0 and 1 on standardised features, so that nothing has to be trained
beside a run. It is some points below a logistic regression of the same features, and a closer look
than that is :mod:`trainer.evaluation.linear`.

Shape suffixes: N training samples, F features, C classes, B samples of a block.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import one_hot

from common.collectives import rank_and_size, sum_ranks
from trainer.features.extraction import Features
from trainer.features.labels import class_count, count_hits

_ROWS = 4096  # samples at a time
_CONSTANT = 1e-12  # of a feature's variance beside its mean's square: it never changes


@torch.no_grad()
def linear_top1(train: Features, test: Features, device: torch.device) -> float:
    """Share of the test samples that are classified rightly, the same on any number of processes.
    A collective: each process adds up its share of both sets, in float64.

    The penalty is F / N of a feature's variance: what is best where classes and noise are alike.

    Args:
        train: labelled features, the same on all processes, as is ``test``.
        test: as ``train``.
        device: where to add up.
    """
    classes, (count, features) = class_count(train.labels_N, test.labels_N), train.features_NF.shape
    sums_2F = torch.zeros(2, features, dtype=torch.float64, device=device)
    for x_BF, _ in _own(train, device):
        sums_2F += torch.stack([x_BF.sum(0), x_BF.square().sum(0)])
    mean_F, square_F = sum_ranks(sums_2F) / count
    variance_F = square_F - mean_F.square()
    scale_F = torch.where(variance_F > _CONSTANT * square_F, variance_F, torch.inf).rsqrt()

    products_FE = sums_2F.new_zeros(features, features + classes)
    for x_BF, labels_B in _own(train, device):
        x_BF = (x_BF - mean_F) * scale_F
        y_BC = one_hot(labels_B, classes).double()
        products_FE += x_BF.T @ torch.cat([x_BF, y_BC], 1)
    products_FE = sum_ranks(products_FE) / count
    gram_FF, target_FC = products_FE.split([features, classes], 1)
    gram_FF.diagonal().add_(features / count)
    weight_FC = torch.linalg.solve(gram_FF, target_FC)
    bias_C = train.labels_N.bincount(minlength=classes).to(device) / count

    hits_2 = torch.zeros(2, dtype=torch.int64, device=device)
    for x_BF, labels_B in _own(test, device):
        hits_2 += count_hits((x_BF - mean_F) * scale_F @ weight_FC + bias_C, labels_B)
    return float(sum_ranks(hits_2)[0]) / len(test.labels_N)


def _own(data: Features, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share, in blocks, in float64."""
    rank, size = rank_and_size()
    share = Features(*(column.tensor_split(size)[rank] for column in data))  # no copies
    for features_BF, labels_B in share.blocks(_ROWS, device):
        yield features_BF.double(), labels_B
