"""Settings of an evaluation by labels."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError
from trainer.evaluation.job import JobConfig
from trainer.evaluation.linear import SIMCLR_IMAGENET, SIMCLR_IMAGENET_CROP, LinearConfig
from trainer.evaluation.logistic import LogisticConfig
from trainer.evaluation.sweep import LEARNING_RATES, WEIGHT_DECAYS

Protocol = Literal["auto", "logistic", "cached", "sweep", "canonical"]
Preset = Literal["simclr-imagenet"]


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted nearest neighbours."""

    k: tuple[int, ...] = (200,)
    """Neighbours that vote; at most the training samples. The first one's result is the result."""
    temperature: float = 0.07


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """One evaluation by labels."""

    method: Literal["knn", "linear"]
    train: Path
    """.beton file whose labels are learnt from."""
    test: Path
    """.beton file that accuracy is measured on."""
    labels_per_class: int | None = None
    """Labelled training samples per class; None: all."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    protocol: Protocol = "auto"
    """Of the linear method."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    base_lrs: tuple[float, ...] = LEARNING_RATES
    """Of a sweep, per 256 samples of a step."""
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    """Of a sweep."""
    preset: Preset | None = None
    """A published protocol; see :func:`preset_config`."""
    logistic: LogisticConfig = field(default_factory=LogisticConfig)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        self.at_least(1, "labels_per_class")
        canonical = self.method == "linear" and self.protocol == "canonical"
        if canonical and self.labels_per_class is not None:
            raise ConfigError(
                "--labels-per-class goes with cached features: use --protocol cached or logistic"
            )


def preset_config(config: EvaluateConfig) -> EvaluateConfig:
    """``config`` with everything that its preset says.

    ``simclr-imagenet`` is SimCLR's linear evaluation of ImageNet: see
    :data:`trainer.evaluation.linear.SIMCLR_IMAGENET`.
    """
    if config.preset is None:
        return config
    size, resize = SIMCLR_IMAGENET_CROP
    return dataclasses.replace(
        config, protocol="canonical", linear=SIMCLR_IMAGENET, size=size, resize=resize
    )
