"""Several labels of an image, or numbers, from features: ``widebatch evaluate targets``.

Shape suffixes: N samples of the training set, M of the test set, T targets, B of a batch.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from sklearn.metrics import mean_absolute_error, r2_score
from torch.nn.functional import binary_cross_entropy_with_logits

from common.bounds import check_bounds
from common.errors import ConfigError, DataError
from data_pipeline.crops import CropConfig
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.finetune import build_classifier
from trainer.evaluation.job import Job, JobConfig, TestFiles, TrainFiles
from trainer.evaluation.load_encoder import at_layer, load_encoder
from trainer.evaluation.supervised import Recipe, fit
from trainer.features.targets import Table, linear, neighbours, precision_of


@dataclass(frozen=True, kw_only=True)
class TargetsConfig(JobConfig):
    """Targets that files were packed with (pack --targets): labels of which an image has several,
    judged by the mean of their average precisions, or numbers, by the share of their variance that
    is explained (R2) and the mean error.

    linear: on frozen features, standardised: a logistic regression for each label, whose strength C
    is chosen on held-out training samples, ridge regression for numbers, whose penalty is chosen by
    leaving one out. knn: the mean of the nearest training images, each with weight exp(cosine
    similarity / temperature). finetune: the encoder is trained on, as by 'evaluate finetune', with
    binary cross-entropy or the squared error. What is not known of an image is left out.
    """

    train: TrainFiles
    """Images to learn from."""
    test: TestFiles
    """Images to measure on."""
    by: Literal["linear", "knn", "finetune"] = "linear"
    """See above."""
    kind: Literal["auto", "labels", "numbers"] = "auto"
    """What targets are. auto: labels where all that is known is 0 or 1."""
    layer: str = ""
    """linear, knn: part of the encoder that gives features, such as layer3; empty: its last."""
    c: float | None = None
    """linear, of labels: inverse strength of L2. None: chosen."""
    k: int = 20
    """knn: neighbours; at most the training samples."""
    temperature: float = 0.07
    """knn: of the weights."""
    epochs: int = 30
    """finetune: passes over the training images."""
    base_lr: float = 0.05
    """finetune: learning rate per 256 images of a step."""
    tuning_batch: int = 1024
    """finetune: images per step over all processes."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        counts = dict.fromkeys(("k", "epochs", "tuning_batch"), "[1, inf)")
        rates = dict.fromkeys(("c", "temperature", "base_lr"), "(0, inf)")
        check_bounds(self, "--", **counts, **rates)
        if self.by == "finetune" and self.layer:
            raise ConfigError("--layer goes with --by linear or knn: fine-tuning is of the whole")


def targets(config: TargetsConfig) -> dict[str, Any] | None:
    """Learn and measure. A collective where several processes were started.

    Returns:
        On rank 0 JSON values: ``method``, ``protocol``, ``kind``, ``mean_average_precision`` or
        ``r2`` and ``mean_absolute_error``, the same ``by_target``, and as other reports; ``None``
        on the others.

    Raises:
        ConfigError: settings contradict each other or the data, or training diverged.
        DataError, CheckpointError: a file is missing, damaged or has no targets, or others.
    """
    loaded = load_encoder(config.source, config.which)
    job = Job(config, at_layer(loaded, config.layer) if config.layer else loaded)
    train, test = OpenData(config.train), OpenData(config.test)
    names, known_NT, known_MT = _shared(train, test)
    are_labels = _are_labels(config, known_NT, known_MT)
    taught = [
        n for n, known_N in enumerate(known_NT.T) if len(np.unique(known_N[known_N == known_N])) > 1
    ]
    if not taught:
        raise DataError(f"{train.info.name}: no target takes two values: nothing can be learnt")
    notes = _left_out("training", names, [names[n] for n in taught])
    names, known_NT, known_MT = [names[n] for n in taught], known_NT[:, taught], known_MT[:, taught]
    with job:
        if config.by == "finetune":
            scores_MT, settings = _tuned(config, job, train, test, known_NT, are_labels)
        else:
            features = job.features(train).features_NF, job.features(test).features_NF
            settings = {}
    if job.rank:
        return None
    if config.by == "knn":
        scores_MT = neighbours(config.k, config.temperature, *features, known_NT, job.device)
        settings = {"k": min(config.k, len(known_NT)), "temperature": config.temperature}
    elif config.by == "linear":
        scores_MT, settings = linear(config.c, config.seed, *features, known_NT, are_labels)
        if settings.get("c_chosen_on_samples") == 0:
            notes.append("C is 1: no label takes two values among the samples to choose it on")
    figures, by_target = _judged(names, scores_MT, known_MT, are_labels)
    notes += _left_out("test", names, by_target)
    return {
        "method": "targets",
        "protocol": config.by,
        "kind": "labels" if are_labels else "numbers",
        **figures,
        "by_target": by_target,
        "n_train": len(known_NT),
        "n_test": len(known_MT),
        "settings": settings,
        "measured": job.measured(targets=names),
        "notes": notes,
        **job.facts(train=train.info, test=test.info),
    }


def _left_out(which: str, names: Sequence[str], kept: Container[str]) -> list[str]:
    lacking = [name for name in names if name not in kept]
    if not lacking:
        return []
    return [f"left out, not two values among the {which} images: {', '.join(lacking)}"]


def _shared(train: OpenData, test: OpenData) -> tuple[list[str], Table, Table]:
    """Names of the targets, and what is known in both sets."""
    names = train.info.target_names
    for info in (train.info, test.info):
        if not info.target_names:
            raise DataError(
                f"{info.name}: has no targets; pack it with 'widebatch pack --targets TABLE.csv'"
            )
    if test.info.target_names != names:
        raise DataError(
            f"{test.info.name}: its targets ({', '.join(test.info.target_names)}) are not those of"
            f" {train.info.name} ({', '.join(names)})"
        )
    return list(names), train.table.targets, test.table.targets


def _are_labels(config: TargetsConfig, *tables: Table) -> bool:
    known = np.concatenate([table[~np.isnan(table)] for table in tables])
    if not len(known):
        raise DataError("nothing is known of any target")
    fit_labels = bool(np.isin(known, (0.0, 1.0)).all())
    if config.kind == "labels" and not fit_labels:
        raise ConfigError("--kind labels: some targets are neither 0 nor 1; take --kind numbers")
    return fit_labels if config.kind == "auto" else config.kind == "labels"


def _tuned(
    config: TargetsConfig,
    job: Job,
    train: OpenData,
    test: OpenData,
    known_NT: Table,
    are_labels: bool,
) -> tuple[Table, dict[str, Any]]:
    """Outputs of the encoder trained on, in the targets' unit. A collective."""
    if not any(True for _ in job.loaded.encoder.parameters()):
        raise ConfigError(f"{config.source} has nothing to train: give an encoder")
    mean_T, scale_T = np.zeros(known_NT.shape[1]), np.ones(known_NT.shape[1])
    if not are_labels:
        mean_T, scale_T = np.nanmean(known_NT, 0), np.nanstd(known_NT, 0)
    answers_NT = torch.from_numpy((known_NT - mean_T) / scale_T).float()
    width = job.loaded.description["feature_dim"]
    model = build_classifier(job.encoder, width, known_NT.shape[1], None, 0)
    recipe = Recipe(
        name="fine-tuning",
        base_lr=config.base_lr,
        batch_size=config.tuning_batch,
        epochs=config.epochs,
        weight_decay=0.0,
        seed=config.seed,
    ).for_samples(train.info.num_samples)
    crop = CropConfig(size=job.preprocessing.size)
    with job.augmented(train, crop, recipe.batch_size, answers=answers_NT) as (steps, batches):
        (loss,) = fit(
            model,
            [recipe],
            batches,
            steps,
            losses=partial(_loss, are_labels=are_labels),
            autocast_dtype=job.autocast,
            together=job.world_size > 1,
            progress=job.rank == 0,
        )
    outputs_MT = job.features(test, model).features_NF.double().numpy()
    return outputs_MT * scale_T + mean_T, recipe.report(steps * recipe.epochs, loss)


def _loss(outputs_BT: torch.Tensor, answers_BT: torch.Tensor, are_labels: bool) -> torch.Tensor:
    """Mean over all places of a batch, (1,), to which an unknown one adds nothing: then means of
    processes are the global one."""
    is_known_BT = ~answers_BT.isnan()
    answers_BT = answers_BT.nan_to_num().to(torch.promote_types(outputs_BT.dtype, torch.float32))
    outputs_BT = outputs_BT.to(answers_BT.dtype)
    if are_labels:
        losses_BT = binary_cross_entropy_with_logits(outputs_BT, answers_BT, reduction="none")
    else:
        losses_BT = (outputs_BT - answers_BT).square() / 2
    return torch.where(is_known_BT, losses_BT, 0).mean()[None]


def _judged(
    names: Sequence[str], scores_MT: Table, known_MT: Table, are_labels: bool
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The means, and the figures of each target that takes two values among the test images."""
    by_target: dict[str, dict[str, float]] = {}
    for name, scores_M, known_M in zip(names, scores_MT.T, known_MT.T):
        is_known = known_M == known_M
        both = known_M[is_known], scores_M[is_known]
        if len(np.unique(both[0])) < 2:
            continue
        if are_labels:
            precision = precision_of(scores_M, known_M)
            by_target[name] = {"average_precision": precision, "share": float(both[0].mean())}
        else:
            by_target[name] = {
                "r2": float(r2_score(*both)),
                "mean_absolute_error": float(mean_absolute_error(*both)),
            }
    if not by_target:
        raise DataError("no target takes two values among the test images: nothing can be judged")
    keys = next(iter(by_target.values())).keys() - {"share"}
    means = {key: float(np.mean([each[key] for each in by_target.values()])) for key in keys}
    if are_labels:
        means = {"mean_average_precision": means["average_precision"]}
    return means, by_target
