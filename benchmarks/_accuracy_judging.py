"""How accuracy.py judges encoders: neighbours and a linear classifier on frozen features."""

import numpy as np
import torch
from _accuracy_budget import SIDE, Budget, read_images
from torch import nn

from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.load_encoder import LoadedEncoder, Preprocessing
from trainer.evaluation.logistic import LogisticConfig, logistic_regression
from trainer.features.extraction import Features
from trainer.features.knn import knn_classify

# Its penalty is not searched for: at 50,000 images and some hundred features it hardly matters.
LOGISTIC = LogisticConfig(c=1.0, max_iterations=200, gradient_tolerance=1e-4)
HELD_OUT, REFERENCE = 2_000, 10_000  # training images that a search asks, and asks against
PARTS = 48  # forward passes that they take


def judge(encoder: nn.Module, budget: Budget) -> dict[str, float]:
    """Test accuracies, fractions of 1, of a frozen encoder: the product's own evaluation."""
    loaded = LoadedEncoder(encoder.eval(), Preprocessing(size=SIDE, resize=SIDE), {})
    loader = LoaderConfig(workers=budget.workers)
    config = JobConfig(source="", loader=loader, device="cpu", precision=budget.precision)
    with Job(config, loaded) as job:
        train, test = job.features(OpenData(budget.train)), job.features(OpenData(budget.test))
    linear = logistic_regression(train, test, LOGISTIC)
    return {"knn": _knn(train, test), "linear": linear.reached.top1}


def _knn(train: Features, test: Features) -> float:
    return knn_classify(train, test).top1


@torch.no_grad()
def judge_held_out(encoder: nn.Module, budget: Budget) -> float:
    """kNN accuracy among training images alone."""
    images, augment = read_images(budget.train), Augment(AugmentConfig(), 0)
    chosen = np.random.default_rng(0).permutation(len(images.labels_N))[: HELD_OUT + REFERENCE]
    encoder.eval()
    features_NF = torch.cat(
        [
            encoder(augment.plain(torch.from_numpy(images.pixels_NHWC[part][:, None])))
            for part in np.array_split(chosen, PARTS)
        ]
    )
    ids_N, labels_N = torch.from_numpy(chosen), torch.from_numpy(images.labels_N[chosen])
    table = Features(features_NF, labels_N, ids_N)
    return _knn(table.take(torch.arange(HELD_OUT, len(ids_N))), table.take(torch.arange(HELD_OUT)))
