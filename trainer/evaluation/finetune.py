"""Train the encoder on with few labels or many: ``widebatch evaluate finetune``."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError
from data_pipeline.crops import CropConfig
from data_pipeline.reading.beton import BetonInfo, check_beton
from data_pipeline.reading.order import IdArray
from trainer.evaluation.classifier import TuningConfig, build_classifier, load_head
from trainer.evaluation.job import Job, JobConfig, TestFile, TrainFile
from trainer.evaluation.labelled_subset import balanced_share, read_list
from trainer.evaluation.protocols import Outcome
from trainer.evaluation.supervised import Batches, fit
from trainer.features.labelled_files import read_labels
from trainer.features.labels import accuracy, class_count, count_hits
from trainer.models.encoders import seed_stochastic_layers, stochastic_layers

_FEW = 0.05  # share of labels below which SimCLR trains for 60 epochs instead of 30


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(JobConfig):
    """Trains the encoder on, with a linear classifier of zeros on top, by SimCLR's recipe.

    SGD with Nesterov momentum, learning rate 0.05 x batch / 256, cosine to 0, no weight decay,
    random crops and flips, BatchNorm statistics of the global batch. Tested on centre crops.

    With 1 % of the labels (--labels 0.01) or 10 %, chosen class by class by the seed, or those of
    --label-list: a text file with a sample id or the name of a packed image file in each line, such
    as SimCLR's imagenet_subsets/1percent.txt. The JSON lists the ids that were used. --head-layers
    1 keeps the first layer of the run's projection head (SimCLR v2).
    """

    train: TrainFile
    """Labelled images to learn from."""
    test: TestFile
    """Labelled images to measure on."""
    labels: float = 1.0
    """Share of the labels, above 0 and at most 1."""
    label_list: Path | None = None
    """The labelled samples, one a line, in place of --labels."""
    images: Path | None = None
    """Folder that the training file was packed from. None: the one that its manifest names."""
    head_layers: int = 0
    """Layers of the projection head to keep."""
    epochs: int | None = TuningConfig.epochs
    """Passes over the labelled images. None: 30, or 60 below 5 % of the labels."""
    base_lr: float = TuningConfig.base_lr
    """Learning rate per 256 images of a step."""
    tuning_batch: int = TuningConfig.batch_size
    """Images per step over all processes."""
    weight_decay: float = TuningConfig.weight_decay
    """L2 on all parameters."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        if not 0 < self.labels <= 1:
            raise ConfigError(f"--labels {self.labels:g}: choose above 0, at most 1 (0.01: 1 %)")
        if self.label_list is not None and self.labels != 1:
            raise ConfigError("--labels and --label-list exclude each other: give one")
        self.at_least(0, "head_layers")
        self.tuning()  # can it be?

    def tuning(self) -> TuningConfig:
        """The training."""
        return TuningConfig(
            base_lr=self.base_lr,
            batch_size=self.tuning_batch,
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )


def finetune(config: FinetuneConfig) -> dict[str, Any] | None:
    """Train on and test. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: as
        :func:`trainer.evaluation.evaluate.evaluate`, and ``labelled_ids``, the training samples
        whose labels were used.

    Raises:
        ConfigError: settings contradict each other or the data, or training diverged.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
    """
    job = Job(config)
    if not any(True for _ in job.loaded.encoder.parameters()):
        raise ConfigError(f"{config.source} has nothing to train: give an encoder")
    infos = check_beton(config.train), check_beton(config.test)
    labels = read_labels(*infos)
    ids = _labelled(config, labels.train_N.numpy())
    head = load_head(job.loaded) if config.head_layers else None
    model = build_classifier(
        job.encoder,
        int(job.loaded.description["feature_dim"]),
        class_count(*labels[:2]),
        head,
        config.head_layers,
    )
    count = len(ids)
    tuning = dataclasses.replace(
        config.tuning(),
        batch_size=min(config.tuning_batch, count),
        epochs=config.epochs or (60 if count < _FEW * infos[0].num_samples else 30),
    )
    with job:
        steps, final_loss = _tune(config.train, job, model, ids, tuning)
        logits = job.features(config.test, model)
        reached = accuracy(count_hits(logits.features_NF, labels.test_M), len(labels.test_M))
    if job.rank:
        return None
    listed = config.label_list
    outcome = Outcome(
        "finetune",
        *reached,
        n_train=count,
        settings={
            **tuning.report(steps, final_loss),
            "labels": config.labels if listed is None else str(listed.absolute()),
            "head_layers": config.head_layers,
        },
        measured=job.measured(
            f"training: random crops and flips; test: {job.measured()['views']}",
            trained=_trained(config.head_layers),
            labelled=f"{count} of {infos[0].num_samples} samples",
            chosen="listed" if listed else f"class-balanced, seed {config.seed}",
            batch_norm="statistics of the global batch",
        ),
        notes=[*_notes(job, infos[0], labels.train_N.numpy(), ids)],
        more={"labelled_ids": ids.tolist()},
    )
    return outcome.report("finetune", job, infos, labels)


def _trained(head_layers: int) -> str:
    if not head_layers:
        return "encoder and classifier"
    layers = "layer" if head_layers == 1 else f"{head_layers} layers"
    return f"encoder, the first {layers} of the head, classifier"


def _labelled(config: FinetuneConfig, labels_N: IdArray) -> IdArray:
    if config.label_list is not None:
        return read_list(config.label_list, config.train, config.images)
    return balanced_share(labels_N, config.labels, config.seed)


def _tune(
    path: Path, job: Job, model: torch.nn.Module, ids: IdArray, tuning: TuningConfig
) -> tuple[int, float]:
    """Steps, and the mean loss of the last epoch. A collective."""
    crop = CropConfig(size=job.preprocessing.size)
    with job.augmented(path, crop, tuning.batch_size, only=ids) as (steps, batches):

        def seeded() -> Batches:
            for step, batch in enumerate(batches):
                seed_stochastic_layers(tuning.seed, step, job.rank)
                yield batch

        loss = fit(
            model,
            tuning,
            seeded(),
            steps,
            autocast_dtype=job.autocast,
            together=job.world_size > 1,
            progress=job.rank == 0,
        )
        return steps * (tuning.epochs or 0), loss


def _notes(job: Job, info: BetonInfo, labels_N: IdArray, ids: IdArray) -> Iterator[str]:
    counts = np.bincount(labels_N[ids], minlength=int(labels_N.max()) + 1)
    counts = counts[np.unique(labels_N)]
    if len(ids) < info.num_samples and counts.min() < counts.max():
        yield f"classes have {counts.min()} to {counts.max()} labelled samples: not balanced"
    random = stochastic_layers(job.encoder)
    if random:
        yield (
            f"{random[0]} draws random numbers while training: the result differs a little with "
            "the number of processes"
        )
