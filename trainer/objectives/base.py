"""What the training loop asks of an objective.

A run's configuration has one of their configurations, whose ``build`` makes the objective.

One step is::

    outputs = objective(inputs)
    loss = objective.loss(outputs, step)
    ...                                     # backward pass, optimizer
    objective.after_step(outputs, step, total_steps, skipped)

Shapes: N images of this process, V views of a group, D dimensions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import tyro
from torch import nn

from common.constants import constants
from data_pipeline.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.order import EpochOrder
from data_pipeline.views import ViewGroup, ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.cost import LossCost, StepSizes

IMAGENET_SAMPLES = 1_281_167
"""Of the data set that plans take where none is named."""


class Given(NamedTuple):
    """What a run tells an objective that is built for it."""

    seed: int = 0
    """Of what the objective draws by itself."""
    num_samples: int = IMAGENET_SAMPLES
    """Of the data set."""
    num_classes: int = 1000
    """Of the data set's labels; 0: it has none."""
    side: int = 224
    """Of the main views, pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Taken from each channel of a view, as a share of white."""
    std: tuple[float, float, float] = IMAGENET_STD
    """What each channel is divided by after that."""

    def normalised(self, colours_NCHW: torch.Tensor) -> torch.Tensor:
        """Views of colours from 0 to 1."""
        return (colours_NCHW - _of_channels(self.mean, colours_NCHW)) / _of_channels(
            self.std, colours_NCHW
        )

    def colours(self, views_NCHW: torch.Tensor) -> torch.Tensor:
        """From 0 to 1, of normalised views."""
        colours = views_NCHW * _of_channels(self.std, views_NCHW)
        return (colours + _of_channels(self.mean, views_NCHW)).clamp(0, 1)


def _of_channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return constants(values, like)[:, None, None]


class Inputs(NamedTuple):
    """What an objective sees of a batch, or of a piece of one; on the device."""

    views: tuple[torch.Tensor, ...]
    """A tensor for each group of views: ``(V, N, 3, H, W)``, every image channels_last."""
    ids_N: torch.Tensor  # noqa: N815
    """int64 sample ids."""
    genuine_N: torch.Tensor  # noqa: N815
    """False where another image is shown in the place of a damaged one."""
    step: int = 0
    """Optimizer steps done before this one: what randomness of a step is keyed by."""
    labels_N: torch.Tensor = torch.empty(0, dtype=torch.int64)  # noqa: N815
    """int64; -1: none. For objectives that are no pretraining."""


def blank_inputs(
    plan: ViewPlan,
    images: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Inputs of a step's shapes and layouts, whose images are black."""
    views = []
    for group in plan:
        count, side = len(group.looks), group.crop.size
        blank = torch.zeros(count * images, 3, side, side, dtype=dtype, device=device)
        blank = blank.to(memory_format=torch.channels_last)
        views.append(blank.unflatten(0, (count, images)))
    ids_N = torch.arange(images, device=device)
    is_genuine = torch.ones_like(ids_N, dtype=torch.bool)
    return Inputs(tuple(views), ids_N, is_genuine, labels_N=torch.zeros_like(ids_N))


class Outputs(NamedTuple):
    """What a forward pass hands to the loss. The first dimension of every tensor is the image, so
    that the outputs of pieces of a batch join to those of the batch."""

    rows: dict[str, torch.Tensor]
    """``(N, ...)``: the loss is differentiated by these and nothing else."""
    fixed: dict[str, torch.Tensor] = {}  # noqa: RUF012 - nobody writes to it
    """``(N, ...)`` without gradient: keys, targets, whose rows these are."""


class Loss(NamedTuple):
    """What the outputs of a step are worth; 0-d and equal on all processes."""

    value: torch.Tensor
    """What the gradient is of."""
    metrics: dict[str, torch.Tensor]
    """What else a person wants to see of the step, by the name it has in metrics.jsonl; without
    gradient. Names that end in ``_top1`` are shares of right answers, 0 to 1: in
    ``contrastive_top1`` of anchors or queries that are nearer to their positive than to anything
    else."""


class Objective(nn.Module):
    """Networks and a loss. ``encoder`` is what is handed on; all else may be its own, ``head``
    from its features to projections where there is one."""

    encoder: Encoder
    head: ProjectionHead

    def __init__(
        self, encoder: Encoder, head: ProjectionHead | None, config: "ObjectiveConfig"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        if head is not None:
            self.head = head

    def forward(self, inputs: Inputs) -> Outputs:
        """Everything that the loss takes of this process's images."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """The loss of the whole process group.

        Called outside autocast: rows are normalised and the loss reduced in float32 or better. The
        gradient is scaled so that DDP's mean over processes is that of the global mean loss. A
        collective.

        Args:
            outputs: of this process's images.
            step: optimizer steps done before this one.
        """
        raise NotImplementedError

    def embedding(self, outputs: Outputs) -> torch.Tensor | None:
        """``(M, D)``, any number of rows an image: what the collapse alarm looks at. None: there
        is nothing that could collapse to one point unseen."""
        return None

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """What follows the optimizer's step: moving averages, queues. A collective.

        Args:
            outputs: of this step.
            step: optimizer steps done before this one.
            total_steps: of the run.
            skipped: 0-d, 1 where the optimizer left the step out for gradients that were not
                finite. Then nothing changes here either, to the bit; decided on the device.
        """

    def before_epoch(self, epoch: int, whole_epoch: Callable[[], Iterator[Outputs]]) -> None:
        """What is made anew for an epoch: clusterings. A collective.

        Called before an epoch's first step, also by a run that goes on from the checkpoint between
        two epochs, and then with what it was called with before; not where a run goes on in the
        middle of an epoch. It is a function of the objective's state and of its arguments.

        Args:
            epoch: from 0.
            whole_epoch: one pass over all samples' batches without gradient, BatchNorm as in
                training. Nothing of the state may change before it begins: a checkpoint is saved
                then, and a stop in the middle of the pass goes on from that.
        """

    def order(self, num_samples: int) -> EpochOrder | None:
        """Which samples the present epoch shows, as ``before_epoch`` has left it; None: all, once.

        A function of the objective's state: a run that goes on in the middle of an epoch asks too.

        Args:
            num_samples: of the data set, and places of an epoch.
        """
        return None

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What the task makes of images, for people: by what they are, ``(N, 3, H, W)`` each,
        normalised as views are. Called in evaluation mode. Empty: there is nothing to look at."""
        return {}

    def sample_clusters(self) -> torch.Tensor | None:
        """The cluster of each sample of the data set, int64 ``(S,)``, negative where it has none:
        people look at what lies together. None: it makes none."""
        return None

    def synchronised_parts(self, sync_batch_norm: bool) -> list[nn.Module]:
        """Parts whose BatchNorm takes its statistics from the global batch, by that setting."""
        return [self] if sync_batch_norm else []

    def caveats(self, sync_batch_norm: bool) -> list[str]:
        """What a user should know before the first step, a line each."""
        if sync_batch_norm:
            return []
        return [
            "BatchNorm statistics are those of one process: another number of processes gives"
            " another run (--sync-batch-norm)"
        ]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Settings of an objective, and what a run is to know before it builds one."""

    looks: ClassVar[int] = 2
    """Views of an image, where they are of one size."""

    name: tyro.conf.Suppress[str]
    """Which objective a saved configuration describes."""

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """Views of each image that a step takes, of the run's settings.

        Args:
            crop: of the main views.
            augment: of one view or two.
        """
        return (ViewGroup(crop, (augment.view1, augment.view2)[: self.looks]),)

    def least_samples(self) -> tuple[int, str]:
        """Samples that an epoch must show, and the setting that asks for them."""
        return 1, ""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> Objective:
        """The objective; what it adds to the encoder draws from torch's generator.

        Args:
            encoder: what is pretrained.
            head: from its features to projections, for objectives that have any.
            given: of the run.

        Raises:
            ConfigError: settings do not go together.
        """
        raise NotImplementedError

    def cost(self, step: StepSizes) -> LossCost:
        """What the loss of a step takes of one process."""
        raise NotImplementedError

    def costs(self, step: StepSizes) -> tuple[LossCost, ...]:
        """The same, of each of several losses."""
        return (self.cost(step),)

    def compares(self, batch: int, num_samples: int) -> str:
        """What an image's loss is made of, in a few words for plans; empty: nothing to be said.

        Args:
            batch: global.
            num_samples: of the data set.
        """
        return ""
