"""A linear classifier on the frozen encoder: ``widebatch evaluate linear``.

Every rank extracts the features of its share of both files; all hold all features after that. The
canonical protocol goes on together, the others on rank 0 alone.
"""

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from common.bounds import check_bounds
from common.errors import ConfigError
from data_pipeline.crops import CropConfig
from trainer.evaluation.labelled import EvaluateConfig, LabelledJob
from trainer.evaluation.logistic import LogisticConfig, LogisticResult, logistic_regression
from trainer.evaluation.supervised import LinearResult, Recipe, linear_probe, train_linear
from trainer.evaluation.sweep import LEARNING_RATES, WEIGHT_DECAYS, sweep_probe
from trainer.features.extraction import Features

Protocol = Literal["auto", "logistic", "cached", "sweep", "canonical"]
Preset = Literal["simclr-imagenet"]

_SIMCLR_IMAGENET_CROP = (224, 256)  # side and shorter side before it at the test, pixels
_OF_SGD = ("epochs", "base_lr", "linear_batch", "weight_decay")  # settings
# Multiplications of one full-batch pass up to which logistic regression takes minutes on two cores.
_LOGISTIC_WORK = 5e8
_CENTRE = "centre crop, not scaled"


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

    protocol: Protocol = "auto"
    """See above."""
    preset: Preset | None = None
    """A published protocol with all its values."""
    c: float | None = None
    """logistic: inverse strength of L2, as scikit-learn's. None: chosen."""
    epochs: int = Recipe.epochs
    """cached, sweep, canonical: passes over the training images."""
    base_lr: tuple[float, ...] = ()
    """cached, canonical: learning rate per 256 images of a step; none: 0.1. sweep: those to try;
    none: nine from 0.003 to 30."""
    linear_batch: int = Recipe.batch_size
    """cached, sweep, canonical: images per step over all processes."""
    weight_decay: tuple[float, ...] = ()
    """cached, canonical: none: 1e-6. sweep: those to try; none: 0, 1e-6, 1e-5 and 1e-4."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(
            self,
            "--",
            c="(0, inf)",
            epochs="[1, inf)",
            base_lr="(0, inf)",
            linear_batch="[1, inf)",
            weight_decay="[0, inf)",
        )
        for name in ("base_lr", "weight_decay"):
            if self.protocol != "sweep" and len(getattr(self, name)) > 1:
                raise ConfigError(f"{_option(name)}: several values go with --protocol sweep")
        if self.protocol == "canonical" and self.labels_per_class is not None:
            raise ConfigError(
                "--labels-per-class goes with cached features: use --protocol cached or logistic"
            )
        self.refuse_settings_of_others(self.protocol)

    def refuse_settings_of_others(self, protocol: Protocol) -> None:
        """Refuse settings that ``protocol`` does not have: it would leave them without effect."""
        of_others: dict[str, tuple[str, ...]] = {"auto": (), "logistic": _OF_SGD}
        foreign = self.changed(*of_others.get(protocol, ("c",)))
        if foreign:
            whose = "logistic" if foreign == ["c"] else "cached, sweep or canonical"
            chosen = ", which auto chose here" if self.protocol == "auto" else ""
            raise ConfigError(
                f"{_option(foreign[0])} is not for --protocol {protocol}{chosen}: leave it out, or "
                f"give --protocol {whose}"
            )

    def changed(self, *names: str) -> list[str]:
        """Which of these settings are not as they come."""
        return [name for name in names if getattr(self, name) != getattr(ProbeConfig, name)]

    def recipe(self) -> Recipe:
        """The training of one classifier; of a sweep, all but its rate and decay."""
        return Recipe(
            base_lr=self.base_lr[0] if self.base_lr else Recipe.base_lr,
            batch_size=self.linear_batch,
            epochs=self.epochs,
            weight_decay=self.weight_decay[0] if self.weight_decay else Recipe.weight_decay,
            seed=self.seed,
        )


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def preset_config(config: ProbeConfig) -> ProbeConfig:
    """``config`` with everything that its preset says: of SGD, what :class:`Recipe` does.

    Raises:
        ConfigError: it says something else itself.
    """
    if config.preset is None:
        return config
    if config.protocol not in ("auto", "canonical"):
        raise ConfigError(f"--preset {config.preset} is canonical: leave out --protocol")
    changed = config.changed(*_OF_SGD, "size", "resize", "c")
    if changed:
        option = _option(changed[0])
        raise ConfigError(f"--preset {config.preset} says what {option} is: leave it out")
    size, resize = _SIMCLR_IMAGENET_CROP
    return replace(config, protocol="canonical", size=size, resize=resize)


def linear(config: ProbeConfig) -> dict[str, Any] | None:
    """Train and test a linear classifier. A collective where several processes were started.

    Returns:
        On rank 0 :meth:`LabelledJob.report`, of a sweep with ``trials``; ``None`` on the others.

    Raises:
        ConfigError: settings contradict each other or the data.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
        NumericalError: the encoder's features are not finite.
    """
    config = preset_config(config)
    job = LabelledJob(config, config.layer)
    notes: list[str] = []
    few_N = config.few(job.labels.train_N)
    with job:
        test = job.test_features()
        protocol = config.protocol
        if protocol == "auto":
            work = len(few_N), test.features_NF.shape[1], job.num_classes
            protocol = "logistic" if math.prod(work) <= _LOGISTIC_WORK else "cached"
            size = "{} samples x {} features x {} classes".format(*work)
            notes.append(f"protocol {protocol} was chosen for {size}")
        config.refuse_settings_of_others(protocol)
        if protocol == "canonical":
            found = _canonical(config, job, test, notes)
        else:
            train = job.features(job.train).take(few_N)
            job.leave()  # other ranks need not wait for what rank 0 does alone
            if job.rank:
                return None
            probe = {"logistic": _logistic, "cached": _cached, "sweep": _sweep}[protocol]
            found = probe(config, job, train, test, notes)
    if job.rank:
        return None
    result, settings, measured, more = found
    settings |= config.budget()
    return job.report(
        "linear", protocol, result.reached, len(few_N), settings, measured, notes, **more
    )


_Found = tuple[LinearResult | LogisticResult, dict[str, Any], dict[str, Any], dict[str, Any]]
"""What a protocol reached, and what a report has of it: settings, ``measured``, more."""


def _logistic(
    config: ProbeConfig, job: LabelledJob, train: Features, test: Features, notes: list[str]
) -> _Found:
    """Full-batch logistic regression on cached features; C is chosen unless it is given."""
    fit = LogisticConfig(c=config.c, seed=config.seed)
    result = logistic_regression(train, test, fit)
    if result.iterations >= fit.max_iterations:
        notes.append(
            f"logistic regression stopped after {result.iterations} iterations at a gradient above "
            f"the {fit.gradient_tolerance:.0e} that it aims for"
        )
    if fit.c is None and not result.chosen_on:
        notes.append("C is 1: one sample per class leaves none to choose it on")
    settings = {
        "c": result.c,
        "c_chosen_on_samples": result.chosen_on,
        "iterations": result.iterations,
        "features": "centre crop, standardised by the training samples",
    }
    return result, settings, job.measured(classifier="logistic regression"), {}


def _cached(
    config: ProbeConfig, job: LabelledJob, train: Features, test: Features, notes: list[str]
) -> _Found:
    """A linear classifier by SGD on cached features."""
    result = linear_probe(train, test, config.recipe(), device=job.device)
    return result, result.settings(_CENTRE), job.measured(classifier="linear, SGD"), {}


def _sweep(
    config: ProbeConfig, job: LabelledJob, train: Features, test: Features, notes: list[str]
) -> _Found:
    """As :func:`_cached`, with the rate and decay that do best on held-out training samples."""
    rates = config.base_lr or LEARNING_RATES
    decays = config.weight_decay or WEIGHT_DECAYS
    result, chosen_on, trials = sweep_probe(
        train, test, config.recipe(), rates, decays, device=job.device
    )
    best = result.recipe.base_lr
    if min(rates) < max(rates) and best in (min(rates), max(rates)):
        notes.append(
            f"the best learning rate, {best:g}, is at the end of those tried: try beyond it with "
            "--base-lr"
        )
    settings = {**result.settings(_CENTRE), "chosen_on_samples": chosen_on}
    how = "linear, SGD; rate and decay chosen on held-out training samples"
    tried = [dataclasses.asdict(trial) for trial in trials]
    return result, settings, job.measured(classifier=how), {"trials": tried}


def _canonical(config: ProbeConfig, job: LabelledJob, test: Features, notes: list[str]) -> _Found:
    """A linear classifier by SGD on fresh crops in every epoch. A collective."""
    count, whole = job.train.info.num_samples, config.recipe()
    recipe = whole.for_samples(count)
    crop = CropConfig(size=job.preprocessing.size)
    with job.augmented(job.train, crop, recipe.batch_size) as (steps, batches):
        result = train_linear(
            ((job.encode(images), labels_B) for images, labels_B in batches),
            steps,
            test,
            job.num_classes,
            recipe,
            device=job.device,
            together=job.world_size > 1,
            progress=job.rank == 0,
        )
    features = f"crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area, flips; new each epoch"
    views = f"training: {features}; test: {job.measured()['views']}"
    settings = result.settings(features)
    measured = job.measured(views, classifier="linear, SGD")
    if config.preset is not None:
        settings["preset"] = measured["preset"] = config.preset
        if recipe != whole:
            notes.append(
                f"preset {config.preset} has steps of {whole.batch_size} images: the "
                f"{count} training samples are fewer"
            )
    return result, settings, measured, {}
