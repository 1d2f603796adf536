"""Evaluate an encoder on two packed files, on any number of ranks: ``widebatch evaluate``.

Every rank extracts the features of its share of both files; all hold all features after that.
Nearest neighbours and the canonical linear probe go on together, the other probes on rank 0 alone.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.beton import BetonInfo, check_beton
from data_pipeline.order import Position
from data_pipeline.views import CropConfig
from trainer.errors import ConfigError
from trainer.evaluation.features import Features
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.knn import knn_classify_each
from trainer.evaluation.labelled_files import read_labels, remarks
from trainer.evaluation.labels import class_count, few_per_class
from trainer.evaluation.linear import (
    SIMCLR_IMAGENET,
    SIMCLR_IMAGENET_CROP,
    LinearConfig,
    LinearResult,
    linear_probe,
    linear_probe_on_crops,
)
from trainer.evaluation.logistic import LogisticConfig, logistic_regression
from trainer.evaluation.sweep import LEARNING_RATES, WEIGHT_DECAYS, sweep_probe

Protocol = Literal["auto", "logistic", "cached", "sweep", "canonical"]
Preset = Literal["simclr-imagenet"]

# Multiplications of one full-batch pass up to which logistic regression takes minutes on two cores.
_LOGISTIC_WORK = 5e8


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
        if self.labels_per_class is None:
            return
        if self.labels_per_class < 1:
            raise ConfigError(f"--labels-per-class {self.labels_per_class}: take at least 1")
        if self.method == "linear" and self.protocol == "canonical":
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


@dataclass(frozen=True)
class _Outcome:
    """What a protocol found, and how."""

    protocol: str
    top1: float
    top5: float
    n_train: int
    settings: dict[str, Any]
    measured: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Run one evaluation. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others. Always there: ``method``, ``protocol``,
        ``top1``, ``top5`` (fractions in [0, 1]; top-5 is within the best ``min(5, num_classes)``),
        ``n_train`` (labelled samples used), ``n_test``, ``num_classes``, ``settings``,
        ``measured`` (checkpoint, online or not, views and what else decides the result),
        ``notes``. With nearest neighbours also ``by_k``, with a sweep ``trials``.

    Raises:
        ConfigError: settings contradict each other or the data.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
        NumericalError: the encoder's features are not finite.
    """
    config = preset_config(config)
    job = Job(config)
    infos = check_beton(config.train), check_beton(config.test)
    labels = read_labels(*infos)
    if config.labels_per_class is not None:
        few_per_class(labels[0], config.labels_per_class, config.seed)  # is it possible?
    with job.session:
        outcome = _run(config, job, infos, class_count(*labels))
    if job.session.rank or outcome is None:
        return None
    values = dataclasses.asdict(outcome)
    more = values.pop("more")
    return {
        "method": config.method,
        **values,
        **more,
        "n_test": infos[1].num_samples,
        "num_classes": class_count(*labels),
        "notes": [*remarks(*infos), *outcome.notes],
        **job.facts(list(zip(("train", "test"), infos))),
    }


def _run(
    config: EvaluateConfig, job: Job, infos: tuple[BetonInfo, BetonInfo], num_classes: int
) -> _Outcome | None:
    """The protocol's outcome on rank 0; on other ranks an equal one or ``None``."""
    session = job.session
    test = session.features(config.test)
    if config.method == "linear" and config.protocol == "canonical":
        return _canonical(config, job, infos[0].num_samples, test, num_classes)
    train = session.features(config.train)
    if config.labels_per_class is not None:
        train = train.take(few_per_class(train.labels_N, config.labels_per_class, config.seed))
    if config.method == "knn":
        return _knn(config, job, train, test, num_classes)
    session.leave()  # other ranks need not wait for what rank 0 does alone
    if session.rank:
        return None
    protocol, reason = _choose_protocol(config, train, num_classes)
    probe = {"logistic": _logistic, "cached": _cached, "sweep": _sweep}[protocol]
    outcome = probe(config, job, train, test)
    return dataclasses.replace(outcome, notes=[*reason, *outcome.notes])


def _knn(
    config: EvaluateConfig, job: Job, train: Features, test: Features, num_classes: int
) -> _Outcome:
    chosen = config.knn
    results = knn_classify_each(
        train.features_NF,
        train.labels_N,
        test.features_NF,
        test.labels_N,
        chosen.k,
        chosen.temperature,
        num_classes,
        device=job.session.device,
        rank=job.session.rank,
        world_size=job.session.world_size,
    )
    first = results[0]
    settings = {
        "k": first.k,
        "requested_k": first.requested_k,
        "temperature": chosen.temperature,
        "similarity": "cosine",
        **_label_budget(config),
    }
    by_k = [
        {"k": r.k, "requested_k": r.requested_k, "top1": r.top1, "top5": r.top5} for r in results
    ]
    notes = [
        f"k {r.requested_k} is more than the {r.k} training samples: all of them vote"
        for r in results
        if r.k < r.requested_k
    ]
    measured = job.measured(k=[r.k for r in results], temperature=chosen.temperature)
    count = len(train.labels_N)
    more = {"by_k": by_k}
    return _Outcome("weighted-knn", first.top1, first.top5, count, settings, measured, notes, more)


def _logistic(config: EvaluateConfig, job: Job, train: Features, test: Features) -> _Outcome:
    chosen = dataclasses.replace(config.logistic, seed=config.seed)
    result = logistic_regression(train, test, chosen, device=job.session.device)
    notes = []
    if not result.converged:
        notes.append(
            f"logistic regression stopped after {result.model.iterations} iterations at a gradient "
            f"of {result.model.largest_gradient:.1e}, above the {chosen.gradient_tolerance:.0e} "
            "that it aims for"
        )
    if chosen.c is None and not result.chosen_on:
        notes.append("C is 1: one sample per class leaves none to choose it on")
    settings = {
        "c": result.c,
        "c_chosen_on_samples": result.chosen_on,
        "iterations": result.model.iterations,
        "features": "centre crop, standardised by the training samples",
        **_label_budget(config),
    }
    return _Outcome(
        "logistic",
        result.top1,
        result.top5,
        len(train.labels_N),
        settings,
        job.measured(classifier="logistic regression"),
        notes,
    )


def _cached(config: EvaluateConfig, job: Job, train: Features, test: Features) -> _Outcome:
    chosen = dataclasses.replace(config.linear, seed=config.seed)
    device = job.session.device
    result = linear_probe(train, test, chosen, device=device, progress=True)
    settings = _linear_settings(config, chosen, result, "centre crop, not scaled")
    measured = job.measured(classifier="linear, SGD")
    return _Outcome("cached", result.top1, result.top5, len(train.labels_N), settings, measured)


def _sweep(config: EvaluateConfig, job: Job, train: Features, test: Features) -> _Outcome:
    shared = dataclasses.replace(config.linear, seed=config.seed)
    found = sweep_probe(
        train,
        test,
        shared,
        config.base_lrs,
        config.weight_decays,
        device=job.session.device,
        progress=True,
    )
    result = found.probe
    settings = {
        **_linear_settings(config, found.config, result, "centre crop, not scaled"),
        "chosen_on_samples": found.chosen_on,
    }
    measured = job.measured(
        classifier="linear, SGD; rate and decay chosen on held-out training samples"
    )
    ends = {min(config.base_lrs), max(config.base_lrs)}
    edge = (
        f"the best learning rate, {found.config.base_lr:g}, is at the end of those tried: try "
        "beyond it with --base-lr"
    )
    at_an_end = len(ends) > 1 and found.config.base_lr in ends
    return _Outcome(
        "sweep",
        result.top1,
        result.top5,
        len(train.labels_N),
        settings,
        measured,
        [edge] if at_an_end else [],
        {"trials": [dataclasses.asdict(trial) for trial in found.trials]},
    )


def _canonical(
    config: EvaluateConfig, job: Job, num_train: int, test: Features, num_classes: int
) -> _Outcome:
    session = job.session
    chosen = dataclasses.replace(config.linear, seed=config.seed)
    crop = CropConfig(size=session.preprocessing.size)
    batch_size = min(chosen.batch_size, num_train)
    with session.random_crops(config.train, crop, batch_size) as (loader, encode):
        result = linear_probe_on_crops(
            encode,
            loader.starting_at(Position(0, 0)),
            loader.steps_per_epoch,
            batch_size,
            test,
            num_classes,
            chosen,
            device=session.device,
            world_size=session.world_size,
            progress=session.rank == 0,
        )
    features = f"crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area, flips; new each epoch"
    settings = _linear_settings(config, chosen, result, features)
    views = f"training: {features}; test: {job.measured()['views']}"
    measured = job.measured(views, classifier="linear, SGD")
    notes = []
    if config.preset is not None:
        settings["preset"] = measured["preset"] = config.preset
        if result.batch_size < chosen.batch_size:
            notes.append(
                f"preset {config.preset} has steps of {chosen.batch_size} images: the "
                f"{num_train} training samples are fewer"
            )
    return _Outcome("canonical", result.top1, result.top5, num_train, settings, measured, notes)


def _linear_settings(
    config: EvaluateConfig, chosen: LinearConfig, result: LinearResult, features: str
) -> dict[str, Any]:
    return {
        "optimizer": "SGD, Nesterov momentum; cosine to 0 per step, no warm-up",
        **dataclasses.asdict(chosen),
        "batch_size": result.batch_size,
        "peak_lr": chosen.peak_lr(result.batch_size),
        "steps": result.steps,
        "final_loss": result.final_loss,
        "features": features,
        **_label_budget(config),
    }


def _label_budget(config: EvaluateConfig) -> dict[str, Any]:
    if config.labels_per_class is None:
        return {}
    return {"labels_per_class": config.labels_per_class, "seed": config.seed}


def _choose_protocol(
    config: EvaluateConfig, train: Features, num_classes: int
) -> tuple[Protocol, list[str]]:
    if config.protocol != "auto":
        return config.protocol, []
    samples, width = train.features_NF.shape
    small = samples * width * num_classes <= _LOGISTIC_WORK
    chosen: Protocol = "logistic" if small else "cached"
    size = f"{samples} samples x {width} features x {num_classes} classes"
    return chosen, [f"protocol {chosen} was chosen for {size}"]
