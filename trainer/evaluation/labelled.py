"""How an evaluation by labels measures an encoder: nearest neighbours and linear probes."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.crops import CropConfig
from data_pipeline.reading.beton import BetonInfo
from trainer.evaluation.evaluate_config import EvaluateConfig, KnnConfig, ProbeConfig
from trainer.evaluation.job import Job
from trainer.evaluation.linear import LinearResult, limited, linear_probe, train_linear
from trainer.evaluation.logistic import logistic_regression
from trainer.evaluation.sweep import LEARNING_RATES, WEIGHT_DECAYS, sweep_probe
from trainer.features.extraction import Features
from trainer.features.knn import knn_classify_each, remark_on_k
from trainer.features.labelled_files import Labels
from trainer.features.labels import class_count

_CENTRE = "centre crop, not scaled"


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

    def report(
        self, method: str, job: Job, infos: tuple[BetonInfo, BetonInfo], labels: Labels
    ) -> dict[str, Any]:
        """JSON values; for the keys see :func:`trainer.evaluation.evaluate.evaluate`."""
        values = dataclasses.asdict(self)
        more = values.pop("more")
        return {
            "method": method,
            **values,
            **more,
            "n_test": infos[1].num_samples,
            "num_classes": class_count(*labels[:2]),
            "notes": [*labels.classes.remarks, *self.notes],
            **job.facts(train=infos[0], test=infos[1]),
        }


def nearest_neighbours(
    config: KnnConfig, job: Job, train: Features, test: Features, num_classes: int
) -> Outcome:
    """Weighted nearest neighbours, each rank its share of the queries. A collective."""
    results = knn_classify_each(
        train.features_NF,
        train.labels_N,
        test.features_NF,
        test.labels_N,
        config.k,
        config.temperature,
        num_classes,
        device=job.device,
        rank=job.rank,
        world_size=job.world_size,
    )
    first = results[0]
    settings = {
        "k": first.k,
        "requested_k": first.requested_k,
        "temperature": config.temperature,
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
    measured = job.measured(k=[r.k for r in results], temperature=config.temperature)
    count = len(train.labels_N)
    for result in results:
        notes += remark_on_k(result.requested_k, count, num_classes, "--k")
    more = {"by_k": by_k}
    return Outcome("weighted-knn", first.top1, first.top5, count, settings, measured, notes, more)


def logistic(config: ProbeConfig, job: Job, train: Features, test: Features) -> Outcome:
    """Full-batch logistic regression on cached features; C is chosen unless it is given."""
    chosen = config.logistic()
    result = logistic_regression(train, test, chosen, device=job.device)
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


def cached(config: ProbeConfig, job: Job, train: Features, test: Features) -> Outcome:
    """A linear classifier by SGD on cached features."""
    result = linear_probe(train, test, config.linear(), device=job.device, progress=True)
    measured = job.measured(classifier="linear, SGD")
    return _linear("cached", config, result, len(train.labels_N), _CENTRE, measured)


def sweep(config: ProbeConfig, job: Job, train: Features, test: Features) -> Outcome:
    """As :func:`cached`, with the rate and decay that do best on held-out training samples."""
    rates = config.base_lr or LEARNING_RATES
    found = sweep_probe(
        train,
        test,
        config.linear(),
        rates,
        config.weight_decay or WEIGHT_DECAYS,
        device=job.device,
        progress=True,
    )
    measured = job.measured(
        classifier="linear, SGD; rate and decay chosen on held-out training samples"
    )
    outcome = _linear("sweep", config, found.probe, len(train.labels_N), _CENTRE, measured)
    outcome.settings["chosen_on_samples"] = found.chosen_on
    outcome.more["trials"] = [dataclasses.asdict(trial) for trial in found.trials]
    best, ends = found.probe.config.base_lr, {min(rates), max(rates)}
    if len(ends) > 1 and best in ends:
        outcome.notes.append(
            f"the best learning rate, {best:g}, is at the end of those tried: try beyond it with "
            "--base-lr"
        )
    return outcome


def canonical(
    config: ProbeConfig, job: Job, num_train: int, test: Features, num_classes: int
) -> Outcome:
    """A linear classifier by SGD on fresh crops in every epoch. A collective."""
    chosen = limited(config.linear(), num_train)
    crop = CropConfig(size=job.preprocessing.size)
    with job.augmented(config.train, crop, chosen.batch_size) as (steps, batches):
        result = train_linear(
            ((job.encode(images), labels_B) for images, labels_B in batches),
            steps,
            test,
            num_classes,
            chosen,
            device=job.device,
            together=job.world_size > 1,
            progress=job.rank == 0,
        )
    features = f"crops of {crop.scale[0]:g} to {crop.scale[1]:g} of the area, flips; new each epoch"
    views = f"training: {features}; test: {job.measured()['views']}"
    measured = job.measured(views, classifier="linear, SGD")
    outcome = _linear("canonical", config, result, num_train, features, measured)
    if config.preset is not None:
        outcome.settings["preset"] = measured["preset"] = config.preset
        if chosen.batch_size < config.linear().batch_size:
            outcome.notes.append(
                f"preset {config.preset} has steps of {config.linear().batch_size} images: the "
                f"{num_train} training samples are fewer"
            )
    return outcome


def _linear(
    protocol: str,
    config: EvaluateConfig,
    result: LinearResult,
    num_train: int,
    features: str,
    measured: dict[str, Any],
) -> Outcome:
    settings = {
        **result.config.report(result.steps, result.final_loss),
        "features": features,
        **_label_budget(config),
    }
    return Outcome(protocol, result.top1, result.top5, num_train, settings, measured)


def _label_budget(config: EvaluateConfig) -> dict[str, Any]:
    if config.labels_per_class is None:
        return {}
    return {"labels_per_class": config.labels_per_class, "seed": config.seed}
