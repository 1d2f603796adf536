"""Evaluations by labels: a set to learn from, one to measure on, and what is said of both.

Shape suffixes: N samples of the training set, M of the test set.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.bounds import check_bounds
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.job import Job, JobConfig, TestFiles, TrainFiles
from trainer.evaluation.load_encoder import at_layer, load_encoder
from trainer.features.extraction import Features
from trainer.features.labelled_files import read_labels
from trainer.features.labels import Accuracy, class_count, few_per_class


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(JobConfig):
    """One evaluation by labels."""

    train: TrainFiles
    """Labelled images to learn from."""
    test: TestFiles
    """Labelled images to measure on."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LabelledConfig):
    """One evaluation of a frozen encoder by labels."""

    labels_per_class: int | None = None
    """Labelled training images of each class to use, chosen by the seed. None: all."""
    layer: str = ""
    """Part of the encoder whose features are taken, such as layer3; empty: its last."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(self, "--", labels_per_class="[1, inf)")

    def few(self, labels_N: torch.Tensor) -> torch.Tensor:
        """Places of the training images to use, ascending.

        Raises:
            DataError: a class has fewer than asked for.
        """
        if self.labels_per_class is None:
            return torch.arange(len(labels_N))
        return few_per_class(labels_N, self.labels_per_class, self.seed)

    def budget(self) -> dict[str, Any]:
        """What a report's settings say of the labels."""
        if self.labels_per_class is None:
            return {}
        return {"labels_per_class": self.labels_per_class, "seed": self.seed}


class LabelledJob(Job):
    """A job with two labelled sets whose classes agree, seen before anything slow happens.

    Raises:
        ConfigError, CheckpointError, DataError: as :class:`Job`; a file is missing, damaged or not
            labelled, or has a class that the other lacks.
    """

    def __init__(self, config: LabelledConfig, layer: str = "") -> None:
        loaded = load_encoder(config.source, config.which)
        super().__init__(config, at_layer(loaded, layer) if layer else loaded)
        self.train, self.test = OpenData(config.train), OpenData(config.test)
        self.labels = read_labels(self.train, self.test)
        self.num_classes = class_count(self.labels.train_N, self.labels.test_M)

    def test_features(self, model: nn.Module | None = None) -> Features:
        """Of the test set, with labels in the training set's numbers. A collective."""
        return self.features(self.test, model)._replace(labels_N=self.labels.test_M)

    def report(
        self,
        method: str,
        protocol: str,
        reached: Accuracy,
        n_train: int,
        settings: dict[str, Any],
        measured: dict[str, Any],
        notes: Iterable[str] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """JSON values of an evaluation by labels.

        Always there: ``method``, ``protocol``, ``top1``, ``top5`` (fractions in [0, 1]; top-5 is
        within the best ``min(5, num_classes)``), ``n_train`` (labelled samples used), ``n_test``,
        ``num_classes``, ``settings``, ``measured`` (checkpoint, online or not, views and what else
        decides the result), ``notes``, and what :meth:`Job.facts` says.
        """
        return {
            "method": method,
            "protocol": protocol,
            "top1": reached.top1,
            "top5": reached.top5,
            "n_train": n_train,
            "settings": settings,
            "measured": measured,
            **more,
            "n_test": self.test.info.num_samples,
            "num_classes": self.num_classes,
            "notes": [*self.labels.classes.remarks, *notes],
            **self.facts(train=self.train.info, test=self.test.info),
        }
