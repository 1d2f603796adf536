"""How an evaluation by labels measures an encoder: nearest neighbours and linear probes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.order import Position
from data_pipeline.views import CropConfig
from trainer.evaluation.evaluate_config import EvaluateConfig
from trainer.evaluation.features import Features
from trainer.evaluation.job import Job
from trainer.evaluation.knn import knn_classify_each, remark_on_k
from trainer.evaluation.linear import (
    LinearConfig,
    LinearResult,
    linear_probe,
    linear_probe_on_crops,
)
from trainer.evaluation.logistic import logistic_regression
from trainer.evaluation.sweep import sweep_probe


@dataclass(frozen=True)
class Outcome:
    """What a protocol found, and how."""

    protocol: str
    top1: float
    top5: float
    n_train: int
    settings: dict[str, Any]
    measured: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def nearest_neighbours(
    config: EvaluateConfig, job: Job, train: Features, test: Features, num_classes: int
) -> Outcome:
    """Weighted nearest neighbours, each rank its share of the queries. A collective."""
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
    for result in results:
        notes += remark_on_k(result.requested_k, count, num_classes, "--k")
    more = {"by_k": by_k}
    return Outcome("weighted-knn", first.top1, first.top5, count, settings, measured, notes, more)


def logistic(config: EvaluateConfig, job: Job, train: Features, test: Features) -> Outcome:
    """Full-batch logistic regression on cached features; C is chosen unless it is given."""
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
    return Outcome(
        "logistic",
        result.top1,
        result.top5,
        len(train.labels_N),
        settings,
        job.measured(classifier="logistic regression"),
        notes,
    )


def cached(config: EvaluateConfig, job: Job, train: Features, test: Features) -> Outcome:
    """A linear classifier by SGD on cached features."""
    chosen = dataclasses.replace(config.linear, seed=config.seed)
    device = job.session.device
    result = linear_probe(train, test, chosen, device=device, progress=True)
    settings = _linear_settings(config, chosen, result, "centre crop, not scaled")
    measured = job.measured(classifier="linear, SGD")
    return Outcome("cached", result.top1, result.top5, len(train.labels_N), settings, measured)


def sweep(config: EvaluateConfig, job: Job, train: Features, test: Features) -> Outcome:
    """As :func:`cached`, with the rate and decay that do best on held-out training samples."""
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
    return Outcome(
        "sweep",
        result.top1,
        result.top5,
        len(train.labels_N),
        settings,
        measured,
        [edge] if at_an_end else [],
        {"trials": [dataclasses.asdict(trial) for trial in found.trials]},
    )


def canonical(
    config: EvaluateConfig, job: Job, num_train: int, test: Features, num_classes: int
) -> Outcome:
    """A linear classifier by SGD on fresh crops in every epoch. A collective."""
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
    return Outcome("canonical", result.top1, result.top5, num_train, settings, measured, notes)


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
