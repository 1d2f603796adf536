"""Settings of an evaluation by labels."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from common.errors import ConfigError
from trainer.evaluation.job import JobConfig, TestFile, TrainFile
from trainer.evaluation.linear import SIMCLR_IMAGENET, SIMCLR_IMAGENET_CROP, LinearConfig
from trainer.evaluation.logistic import LogisticConfig

Protocol = Literal["auto", "logistic", "cached", "sweep", "canonical"]
Preset = Literal["simclr-imagenet"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """One evaluation by labels."""

    method: ClassVar[str]
    train: TrainFile
    """Labelled images to learn from."""
    test: TestFile
    """Labelled images to measure on."""
    labels_per_class: int | None = None
    """Labelled training images of each class to use, chosen by the seed. None: all."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        self.at_least(1, "labels_per_class")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluateConfig):
    """Weighted k nearest neighbours by cosine similarity.

    Each of the k nearest training images votes for its class with weight exp(similarity /
    temperature). Exact, deterministic. Of several k, found in one pass, the first is the result and
    all are in the JSON as by_k.
    """

    method = "knn"
    k: tuple[int, ...] = (200,)
    """Neighbours that vote; at most the training samples."""
    temperature: float = 0.07
    """Of the votes."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        if not self.k:
            raise ConfigError("--k: name at least one number of neighbours")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(EvaluateConfig):
    """A linear classifier on the frozen encoder.

    Protocols:
      logistic   multinomial logistic regression on features of centre crops, full batch to
                 convergence, L2 of strength C on standardised features; C chosen on held-out
                 training images
      cached     SimCLR's recipe on features of centre crops: SGD with Nesterov momentum, learning
                 rate 0.1 x batch / 256, cosine to 0, batch 4096, 90 epochs, weight decay 1e-6
      sweep      the same for every --base-lr with every --weight-decay at once, one matrix product
                 for all; the best on held-out training images is trained again on all of them
      canonical  as cached with new random crops and flips of each image in every epoch, through the
                 encoder: what published figures use
      auto       logistic where images x features x classes is up to 5e8, else cached; the output
                 says which

    --preset simclr-imagenet is SimCLR's protocol for ImageNet with all its values: canonical, 90
    epochs, batch 4096, learning rate 1.6, weight decay 1e-6, crops of 224 pixels (of 256 at the
    test).
    """

    method = "linear"
    protocol: Protocol = "auto"
    """See above."""
    preset: Preset | None = None
    """A published protocol with all its values."""
    c: float | None = None
    """logistic: inverse strength of L2, as scikit-learn's. None: chosen."""
    epochs: int = LinearConfig.epochs
    """cached, sweep, canonical: passes over the training images."""
    base_lr: tuple[float, ...] = ()
    """cached, canonical: learning rate per 256 images of a step; none: 0.1. sweep: those to try;
    none: nine from 0.003 to 30."""
    linear_batch: int = LinearConfig.batch_size
    """cached, sweep, canonical: images per step over all processes."""
    weight_decay: tuple[float, ...] = ()
    """cached, canonical: none: 1e-6. sweep: those to try; none: 0, 1e-6, 1e-5 and 1e-4."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        for name in ("base_lr", "weight_decay"):
            if self.protocol != "sweep" and len(getattr(self, name)) > 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option}: several values go with --protocol sweep")
        if self.protocol == "canonical" and self.labels_per_class is not None:
            raise ConfigError(
                "--labels-per-class goes with cached features: use --protocol cached or logistic"
            )
        self.linear(), self.logistic()  # can they be?

    def linear(self) -> LinearConfig:
        """The training of one classifier; of a sweep, all but its rate and decay."""
        if self.preset is not None:
            return replace(SIMCLR_IMAGENET, seed=self.seed)
        return LinearConfig(
            base_lr=self.base_lr[0] if self.base_lr else LinearConfig.base_lr,
            batch_size=self.linear_batch,
            epochs=self.epochs,
            weight_decay=self.weight_decay[0] if self.weight_decay else LinearConfig.weight_decay,
            seed=self.seed,
        )

    def logistic(self) -> LogisticConfig:
        """The fit of the protocol of that name."""
        return LogisticConfig(c=self.c, seed=self.seed)


def preset_config(config: ProbeConfig) -> ProbeConfig:
    """``config`` with everything that its preset says.

    ``simclr-imagenet`` is SimCLR's linear evaluation of ImageNet: see
    :data:`trainer.evaluation.linear.SIMCLR_IMAGENET`.

    Raises:
        ConfigError: it says something else itself.
    """
    if config.preset is None:
        return config
    if config.protocol not in ("auto", "canonical"):
        raise ConfigError(f"--preset {config.preset} is canonical: leave out --protocol")
    for name in ("epochs", "base_lr", "linear_batch", "weight_decay", "size", "resize", "c"):
        if getattr(config, name) != getattr(ProbeConfig, name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"--preset {config.preset} says what {option} is: leave it out")
    size, resize = SIMCLR_IMAGENET_CROP
    return replace(config, protocol="canonical", size=size, resize=resize)
