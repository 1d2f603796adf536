"""Evaluate an encoder on two packed files, on any number of ranks: ``widebatch evaluate``.

Every rank extracts the features of its share of both files; all hold all features after that.
Nearest neighbours and the canonical linear probe go on together, the other probes on rank 0 alone.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.beton import BetonInfo, check_beton, read_sample_table
from data_pipeline.errors import DataError
from data_pipeline.loader import LoaderConfig
from data_pipeline.order import Position
from data_pipeline.views import CropConfig
from trainer.errors import ConfigError
from trainer.evaluation.features import Features
from trainer.evaluation.knn import knn_classify
from trainer.evaluation.labels import class_count, few_per_class
from trainer.evaluation.linear import (
    LinearConfig,
    LinearResult,
    linear_probe,
    linear_probe_on_crops,
)
from trainer.evaluation.logistic import LogisticConfig, logistic_regression
from trainer.evaluation.session import Session
from trainer.provenance import versions
from trainer.weights import Which, load_encoder

Protocol = Literal["auto", "logistic", "cached", "canonical"]
Precision = Literal["fp32", "bf16", "fp64"]

# Multiplications of one full-batch pass up to which logistic regression takes minutes on two cores.
_LOGISTIC_WORK = 5e8


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted nearest neighbours."""

    k: int = 200  # neighbours that vote; at most the training samples
    temperature: float = 0.07


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation."""

    source: str
    """What :func:`trainer.weights.load_encoder` takes."""
    method: Literal["knn", "linear"]
    train: Path
    """.beton file whose labels are learnt from."""
    test: Path
    """.beton file that accuracy is measured on."""
    which: Which = "last"
    size: int | None = None
    """Side of the centre crop, pixels; None: the encoder's."""
    resize: int | None = None
    """Shorter side before the crop, pixels; None: the encoder's."""
    batch: int = 256
    """Images per process and forward pass."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    device: str = "auto"
    precision: Precision = "fp32"
    """Arithmetic of the encoder; features are compared and probed in float32 or better."""
    labels_per_class: int | None = None
    """Labelled training samples per class; None: all."""
    seed: int = 0
    """Of the choice of labelled samples, of splits and of orders."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    protocol: Protocol = "auto"
    """Of the linear method."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    logistic: LogisticConfig = field(default_factory=LogisticConfig)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: take at least 1 image")
        if self.labels_per_class is None:
            return
        if self.labels_per_class < 1:
            raise ConfigError(f"--labels-per-class {self.labels_per_class}: take at least 1")
        if self.method == "linear" and self.protocol == "canonical":
            raise ConfigError(
                "--labels-per-class goes with cached features: use --protocol cached or logistic"
            )


@dataclass(frozen=True)
class _Outcome:
    """What a protocol found, and how."""

    protocol: str
    top1: float
    top5: float
    n_train: int
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Run one evaluation. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others. Always there: ``method``, ``protocol``,
        ``top1``, ``top5`` (fractions in [0, 1]; top-5 is within the best ``min(5, num_classes)``),
        ``n_train`` (labelled samples used), ``n_test``, ``num_classes``, ``settings``, ``notes``.

    Raises:
        ConfigError: settings contradict each other or the data.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
        NumericalError: the encoder's features are not finite.
    """
    started = time.monotonic()
    loaded = load_encoder(config.source, config.which)
    infos = check_beton(config.train), check_beton(config.test)
    labels = _check_labels(config, *infos)
    preprocessing = loaded.preprocessing.resized(config.size, config.resize)
    session = Session(
        loaded,
        preprocessing,
        config.loader,
        batch=config.batch,
        device=config.device,
        precision=config.precision,
        seed=config.seed,
    )
    with session:
        outcome = _run(config, session, labels)
    if session.rank or outcome is None:
        return None
    return {
        "method": config.method,
        **dataclasses.asdict(outcome),
        "n_test": infos[1].num_samples,
        "num_classes": class_count(*labels),
        "notes": [*_notes(*infos), *outcome.notes],
        "encoder": loaded.description,
        "preprocessing": dataclasses.asdict(preprocessing),
        "data": {name: _data_facts(info) for name, info in zip(("train", "test"), infos)},
        "precision": config.precision,
        "device": str(session.device),
        "processes": session.world_size,
        "seconds": round(time.monotonic() - started, 2),
        "versions": versions(),
    }


def _run(
    config: EvaluateConfig, session: Session, labels: tuple[torch.Tensor, torch.Tensor]
) -> _Outcome | None:
    """The protocol's outcome on rank 0; on other ranks an equal one or ``None``."""
    num_classes = class_count(*labels)
    test = session.features(config.test)
    if config.method == "linear" and config.protocol == "canonical":
        return _canonical(config, session, len(labels[0]), test, num_classes)
    train = session.features(config.train)
    if config.labels_per_class is not None:
        train = train.take(few_per_class(train.labels_N, config.labels_per_class, config.seed))
    if config.method == "knn":
        return _knn(config, session, train, test, num_classes)
    session.leave()  # other ranks need not wait for what rank 0 does alone
    if session.rank:
        return None
    protocol, reason = _choose_protocol(config, train, num_classes)
    probe = _logistic if protocol == "logistic" else _cached
    outcome = probe(config, session.device, train, test)
    return dataclasses.replace(outcome, notes=[*reason, *outcome.notes])


def _knn(
    config: EvaluateConfig, session: Session, train: Features, test: Features, num_classes: int
) -> _Outcome:
    chosen = config.knn
    result = knn_classify(
        train.features_NF,
        train.labels_N,
        test.features_NF,
        test.labels_N,
        chosen.k,
        chosen.temperature,
        num_classes,
        device=session.device,
        rank=session.rank,
        world_size=session.world_size,
    )
    clipped = f"k {chosen.k} is more than the {result.k} training samples: all of them vote"
    return _Outcome(
        "weighted-knn",
        result.top1,
        result.top5,
        len(train.labels_N),
        {
            "k": result.k,
            "requested_k": chosen.k,
            "temperature": chosen.temperature,
            "similarity": "cosine",
            **_label_budget(config),
        },
        [clipped] if result.k < chosen.k else [],
    )


def _logistic(
    config: EvaluateConfig, device: torch.device, train: Features, test: Features
) -> _Outcome:
    chosen = dataclasses.replace(config.logistic, seed=config.seed)
    result = logistic_regression(train, test, chosen, device=device)
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
    return _Outcome("logistic", result.top1, result.top5, len(train.labels_N), settings, notes)


def _cached(
    config: EvaluateConfig, device: torch.device, train: Features, test: Features
) -> _Outcome:
    chosen = dataclasses.replace(config.linear, seed=config.seed)
    result = linear_probe(train, test, chosen, device=device, progress=True)
    settings = _linear_settings(config, chosen, result, "centre crop, not scaled")
    return _Outcome("cached", result.top1, result.top5, len(train.labels_N), settings)


def _canonical(
    config: EvaluateConfig, session: Session, num_train: int, test: Features, num_classes: int
) -> _Outcome:
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
    return _Outcome("canonical", result.top1, result.top5, num_train, settings)


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


def _check_labels(
    config: EvaluateConfig, train: BetonInfo, test: BetonInfo
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of both files; refuses, before anything slow happens, what they cannot support."""
    for info in (train, test):
        if not info.has_label:
            raise DataError(
                f"{info.path}: {info.num_samples - info.num_labelled} of {info.num_samples} "
                "samples have no label; pack a folder with one sub-folder per class, or a "
                "labelled data set"
            )
    if train.class_names and test.class_names and train.class_names != test.class_names:
        raise DataError(_first_difference(train, test))
    labels_N, labels_M = (torch.from_numpy(read_sample_table(i.path).labels) for i in (train, test))
    if config.labels_per_class is not None:
        few_per_class(labels_N, config.labels_per_class, config.seed)
    return labels_N, labels_M


def _first_difference(train: BetonInfo, test: BetonInfo) -> str:
    number = next(
        (n for n, (a, b) in enumerate(zip(train.class_names, test.class_names)) if a != b),
        min(len(train.class_names), len(test.class_names)),
    )
    names = [
        repr(info.class_names[number]) if number < len(info.class_names) else "missing"
        for info in (train, test)
    ]
    return (
        f"class {number} is {names[0]} in {train.path} and {names[1]} in {test.path}: "
        "pack both from folders with the same class names"
    )


def _data_facts(info: BetonInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "fingerprint": info.fingerprint,
        "num_samples": info.num_samples,
        "class_names": list(info.class_names),
    }


def _notes(train: BetonInfo, test: BetonInfo) -> Iterator[str]:
    if train.fingerprint == test.fingerprint:
        yield (
            f"warning: {train.path} and {test.path} have the same content: this is the accuracy "
            "on what was learnt from"
        )
    if bool(train.class_names) != bool(test.class_names):
        yield "only one of the two files names its classes: they are matched by number"
