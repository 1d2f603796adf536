"""Evaluate an encoder on two packed files, on any number of ranks: ``widebatch evaluate``.

Every rank extracts the features of its share of both files; all hold all features after that.
Nearest neighbours and the canonical linear probe go on together, the other probes on rank 0 alone.
"""

import dataclasses
from typing import Any

from data_pipeline.reading.beton import BetonInfo, check_beton
from trainer.evaluation import protocols
from trainer.evaluation.evaluate_config import (
    KnnConfig,
    ProbeConfig,
    Protocol,
    preset_config,
)
from trainer.evaluation.job import Job
from trainer.evaluation.protocols import Outcome
from trainer.features.extraction import Features
from trainer.features.labelled_files import Labels, read_labels
from trainer.features.labels import class_count, few_per_class

# Multiplications of one full-batch pass up to which logistic regression takes minutes on two cores.
_LOGISTIC_WORK = 5e8


def evaluate(config: KnnConfig | ProbeConfig) -> dict[str, Any] | None:
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
    if isinstance(config, ProbeConfig):
        config = preset_config(config)
    job = Job(config)
    infos = check_beton(config.train), check_beton(config.test)
    labels = read_labels(*infos)
    if config.labels_per_class is not None:
        few_per_class(labels.train_N, config.labels_per_class, config.seed)  # is it possible?
    with job:
        outcome = _run(config, job, infos, labels)
    if job.rank or outcome is None:
        return None
    return outcome.report(config.method, job, infos, labels)


def _run(
    config: KnnConfig | ProbeConfig,
    job: Job,
    infos: tuple[BetonInfo, BetonInfo],
    labels: Labels,
) -> Outcome | None:
    """The protocol's outcome on rank 0; on other ranks an equal one or ``None``."""
    num_classes = class_count(*labels[:2])
    test = job.features(config.test)._replace(labels_N=labels.test_M)
    if isinstance(config, ProbeConfig) and config.protocol == "canonical":
        return protocols.canonical(config, job, infos[0].num_samples, test, num_classes)
    train = job.features(config.train)
    if config.labels_per_class is not None:
        train = train.take(few_per_class(train.labels_N, config.labels_per_class, config.seed))
    if isinstance(config, KnnConfig):
        return protocols.nearest_neighbours(config, job, train, test, num_classes)
    job.leave()  # other ranks need not wait for what rank 0 does alone
    if job.rank:
        return None
    protocol, reason = _choose_protocol(config, train, num_classes)
    probes = {
        "logistic": protocols.logistic,
        "cached": protocols.cached,
        "sweep": protocols.sweep,
    }
    probe = probes[protocol]
    outcome = probe(config, job, train, test)
    return dataclasses.replace(outcome, notes=[*reason, *outcome.notes])


def _choose_protocol(
    config: ProbeConfig, train: Features, num_classes: int
) -> tuple[Protocol, list[str]]:
    if config.protocol != "auto":
        return config.protocol, []
    samples, width = train.features_NF.shape
    small = samples * width * num_classes <= _LOGISTIC_WORK
    chosen: Protocol = "logistic" if small else "cached"
    size = f"{samples} samples x {width} features x {num_classes} classes"
    return chosen, [f"protocol {chosen} was chosen for {size}"]
