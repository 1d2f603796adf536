"""Train the encoder on with few labels or many: ``widebatch evaluate finetune``.

SimCLR's fine-tuning (Chen et al. 2020, arXiv 2002.05709, appendix B.5): learning rate 0.05 x batch
/ 256, no weight decay, random crops and flips alone. SimCLR v2 (arXiv 2006.10029) keeps the first
layers of the projection head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from data_pipeline.crops import CropConfig
from data_pipeline.reading.order import EpochOrder, IdArray
from trainer.config import from_json
from trainer.evaluation.labelled import LabelledConfig, LabelledJob
from trainer.evaluation.labelled_subset import balanced_share, read_list
from trainer.evaluation.load_encoder import LoadedEncoder, fill
from trainer.evaluation.supervised import Batches, Recipe, fit, zero_linear
from trainer.features.labels import accuracy, count_hits
from trainer.models.encoders import seed_stochastic_layers, stochastic_layers
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.state.checkpoint import CheckpointStore

_FEW = 0.05  # share of labels below which SimCLR trains for 60 epochs instead of 30
_HEAD = "head."


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabelledConfig):
    """Trains the encoder on, with a linear classifier of zeros on top, by SimCLR's recipe.

    SGD with Nesterov momentum, learning rate 0.05 x batch / 256, cosine to 0, no weight decay,
    random crops and flips, BatchNorm statistics of the global batch. Tested on centre crops.

    With 1 % of the labels (--labels 0.01) or 10 %, chosen class by class by the seed, or those of
    --label-list: a text file with a sample id or the name of a packed image file in each line, such
    as SimCLR's imagenet_subsets/1percent.txt. The JSON lists the ids that were used. --head-layers
    1 keeps the first layer of the run's projection head (SimCLR v2).
    """

    labels: float = 1.0
    """Share of the labels, above 0 and at most 1."""
    label_list: Path | None = None
    """The labelled samples, one a line, in place of --labels."""
    images: Path | None = None
    """Folder that the training files were packed from. None: the one that its manifest names."""
    head_layers: int = 0
    """Layers of the projection head to keep."""
    epochs: int | None = None
    """Passes over the labelled images. None: 30, or 60 below 5 % of the labels."""
    base_lr: float = 0.05
    """Learning rate per 256 images of a step."""
    tuning_batch: int = 1024
    """Images per step over all processes."""
    weight_decay: float = 0.0
    """L2 on all parameters."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(
            self,
            "--",
            labels="(0, 1]",
            head_layers="[0, inf)",
            epochs="[1, inf)",
            base_lr="(0, inf)",
            tuning_batch="[1, inf)",
            weight_decay="[0, inf)",
        )
        if self.label_list is not None and self.labels != 1:
            raise ConfigError("--labels and --label-list exclude each other: give one")

    def recipe(self, labelled: int, total: int) -> Recipe:
        """The training on so many labelled samples of all."""
        usual = 60 if labelled < _FEW * total else 30
        recipe = Recipe(
            name="fine-tuning",
            base_lr=self.base_lr,
            batch_size=self.tuning_batch,
            epochs=usual if self.epochs is None else self.epochs,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )
        return recipe.for_samples(labelled)


def finetune(config: FinetuneConfig) -> dict[str, Any] | None:
    """Train on and test. A collective where several processes were started.

    Returns:
        On rank 0 :meth:`LabelledJob.report` with ``labelled_ids``, the training samples whose
        labels were used; ``None`` on the others.

    Raises:
        ConfigError: settings contradict each other or the data, or training diverged.
        DataError, CheckpointError: a file is missing, damaged or not labelled.
    """
    job = LabelledJob(config)
    if not any(True for _ in job.loaded.encoder.parameters()):
        raise ConfigError(f"{config.source} has nothing to train: give an encoder")
    labels_N, total = job.labels.train_N.numpy(), job.train.info.num_samples
    if config.label_list is None:
        ids = balanced_share(labels_N, config.labels, config.seed)
    else:
        ids = read_list(config.label_list, job.train, config.images)
    head = load_head(job.loaded) if config.head_layers else None
    width = job.loaded.description["feature_dim"]
    model = build_classifier(job.encoder, width, job.num_classes, head, config.head_layers)
    recipe = config.recipe(len(ids), total)
    with job:
        steps, final_loss = _tune(job, model, ids, recipe)
        logits = job.test_features(model)
        hits = count_hits(logits.features_NF, logits.labels_N)
    if job.rank:
        return None
    listed = config.label_list
    return job.report(
        "finetune",
        "finetune",
        accuracy(hits, len(logits.labels_N)),
        len(ids),
        settings={
            **recipe.report(steps, final_loss),
            "labels": config.labels if listed is None else str(listed.absolute()),
            "head_layers": config.head_layers,
        },
        measured=job.measured(
            f"training: random crops and flips; test: {job.measured()['views']}",
            trained=_trained(config.head_layers),
            labelled=f"{len(ids)} of {total} samples",
            chosen="listed" if listed else f"class-balanced, seed {config.seed}",
            batch_norm="statistics of the global batch",
        ),
        notes=_notes(job, labels_N, ids),
        labelled_ids=ids.tolist(),
    )


def _trained(head_layers: int) -> str:
    if not head_layers:
        return "encoder and classifier"
    layers = "layer" if head_layers == 1 else f"{head_layers} layers"
    return f"encoder, the first {layers} of the head, classifier"


def load_head(loaded: LoadedEncoder) -> ProjectionHead:
    """The projection head of a run, of the very checkpoint that its encoder was loaded from.

    Raises:
        ConfigError: the encoder is not of a run's folder: exports have no head.
        CheckpointError: the checkpoint does not hold the head that the run's settings describe.
    """
    known = loaded.description
    if known["kind"] != "run":
        raise ConfigError(
            f"--head-layers: {known['source']} has no projection head; give the run's folder"
        )
    run = Path(known["source"])
    settings = loaded.settings.get("head", {})
    config = from_json(HeadConfig, settings, f"{run / 'config.json'}: head")
    head = ProjectionHead(known["feature_dim"], config)
    tensors = CheckpointStore(run / "checkpoints").read(known["step"]).tensors("model")
    own = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
    if not own:
        raise ConfigError(
            f"--head-layers: {run}: its objective has no projection head whose layers could be kept"
        )
    fill(head, own, f"{run}: the head in its checkpoint")
    return head


def build_classifier(
    encoder: nn.Module, width: int, num_classes: int, head: ProjectionHead | None, depth: int
) -> nn.Sequential:
    """Encoder, ``depth`` layers of the head, and a linear layer of zeros, in the encoder's dtype.

    The encoder, ``(B, 3, H, W) -> (B, width)``, is trained in place.

    Raises:
        ConfigError: the head has not so many layers below its last one.
    """
    parts = [encoder]
    if depth:
        layers = [] if head is None else list(head.layers)
        if not 0 < depth < len(layers):
            raise ConfigError(
                f"--head-layers {depth}: the run's head has {len(layers)} layers, and the last is "
                f"never kept; choose 0 to {max(0, len(layers) - 1)}"
            )
        parts += layers[:depth]
        width = layers[depth].linear.in_features  # type: ignore[union-attr,assignment]
    of_encoder = next(encoder.parameters(), torch.empty(0))
    return nn.Sequential(*parts, zero_linear(width, num_classes)).to(
        of_encoder.device, of_encoder.dtype
    )


def _tune(job: LabelledJob, model: nn.Module, ids: IdArray, recipe: Recipe) -> tuple[int, float]:
    """Steps, and the mean loss of the last epoch. A collective."""
    crop = CropConfig(size=job.preprocessing.size)
    order = EpochOrder.of(ids)
    with job.augmented(job.train, crop, recipe.batch_size, order=order) as (steps, batches):

        def seeded() -> Batches:
            for step, batch in enumerate(batches):
                seed_stochastic_layers(recipe.seed, step, job.rank)
                yield batch

        (loss,) = fit(
            model,
            [recipe],
            seeded(),
            steps,
            autocast_dtype=job.autocast,
            together=job.world_size > 1,
            progress=job.rank == 0,
        )
        return steps * recipe.epochs, loss


def _notes(job: LabelledJob, labels_N: IdArray, ids: IdArray) -> Iterator[str]:
    counts = np.bincount(labels_N[ids], minlength=int(labels_N.max()) + 1)
    counts = counts[np.unique(labels_N)]
    if len(ids) < len(labels_N) and counts.min() < counts.max():
        yield f"classes have {counts.min()} to {counts.max()} labelled samples: not balanced"
    random = stochastic_layers(job.encoder)
    if random:
        yield (
            f"{random[0]} draws random numbers while training: the result differs a little with "
            "the number of processes"
        )
