"""Cross-entropy of images that do not meet: the mean over all processes, and the share of hits."""

import torch
from torch.nn.functional import cross_entropy

from common.errors import ConfigError
from kernels.ntxent.reference import statistics_dtype
from trainer.objectives.parts.global_mean import global_mean


def check_labels(num_classes: int) -> None:
    """Refuse data that has nothing to learn from.

    Raises:
        ConfigError: it has no labels, or all are the same.
    """
    if num_classes < 2:
        raise ConfigError(
            "--data.train: a supervised run needs labels of two classes or more; pack a folder with"
            " one sub-folder per class"
        )


def classification(
    logits_NLK: torch.Tensor, targets_NL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy, and the share of right answers without gradient. A collective.

    Args:
        logits_NLK: of L questions about each of this process's N images, K answers to each; reduced
            in float32 or better.
        targets_NL: int64, the right ones.
    """
    logits_NLK = logits_NLK.to(statistics_dtype(logits_NLK.dtype))
    losses_NL = cross_entropy(logits_NLK.transpose(1, 2), targets_NL, reduction="none")
    hits_NL = (logits_NLK.detach().argmax(2) == targets_NL).to(losses_NL.dtype)
    value, top1 = global_mean(torch.stack([losses_NL.mean(1), hits_NL.mean(1)], 1))
    return value, top1.detach()
