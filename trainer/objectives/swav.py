"""SwAV: from every view of an image, predict the code that another of its views has.

Caron et al. 2020, arXiv 2006.09882. Codes share the images of the global batch, and of a queue of
past ones where batches are small, out among prototypes, which are learnt in the same step.

Shapes: N images of this process, V views of all sizes, K prototypes, D dimensions.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.collectives import gather_rows, rank_and_size
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.key_queue import KeyQueue
from trainer.objectives.parts.multi_crop import LARGE, MultiCropConfig, project_all
from trainer.objectives.parts.prototypes import Prototypes, sinkhorn


@dataclass(frozen=True, kw_only=True)
class SwAVConfig(MultiCropConfig):
    """Cross-entropy with codes; the defaults are the paper's for ImageNet with batches of 4096."""

    name: tyro.conf.Suppress[Literal["swav"]] = "swav"
    """Which objective a saved configuration describes."""
    temperature: float = 0.1
    """Divides the cosine similarities with the prototypes."""
    prototypes: int = 3000
    """K."""
    epsilon: float = 0.05
    """Smoothness of the codes: higher ones are more alike. Where the loss stays at ln K: 0.03."""
    iterations: int = 3
    """Of Sinkhorn's algorithm."""
    frozen_steps: int = 313
    """First steps of a run, in which prototypes stay as they are: about one epoch."""
    queue: int = 0
    """Embeddings of past images, of each large view, that take part in the codes; 0: none. For
    batches of fewer images than prototypes, a multiple of the batch."""
    queue_from: int = 0
    """First step that uses the queue; never before as many images have been seen as it holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(
            self,
            "--objective.",
            temperature="(0, inf)",
            prototypes="[2, 1e7]",
            epsilon="[0.003, inf)",
            iterations="[1, 1e6]",
            frozen_steps="[0, 1e15]",
            queue="[0, 1e9]",
            queue_from="[0, 1e15]",
        )

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "SwAV":
        """Encoder, head, prototypes and queues."""
        return SwAV(encoder, ProjectionHead(encoder.feature_dim, head), self)

    def cost(self, step: StepSizes) -> LossCost:
        """Cross-entropy of every view."""
        rows = (LARGE + self.small_views) * step.local_batch
        return softmax_cost(rows, self.prototypes, step.dim)

    def compares(self, batch: int, num_samples: int) -> str:
        """Every view with the prototypes."""
        return f"{(LARGE + self.small_views) * self.prototypes} logits per image"


class SwAV(Objective):
    """Encoder, head, prototypes, and a queue for each large view."""

    config: SwAVConfig

    def __init__(self, encoder: Encoder, head: ProjectionHead, config: SwAVConfig) -> None:
        super().__init__(encoder, head, config)
        self.prototypes = Prototypes(config.prototypes, head.out_dim)
        count = LARGE if config.queue else 0
        self.queues = nn.ModuleList(KeyQueue(config.queue, head.out_dim) for _ in range(count))

    def forward(self, inputs: Inputs) -> Outputs:
        """``cosines`` of all views with the prototypes, ``(N, V, K)``, and the unit projections of
        the large ones, ``(N, 2, D)``."""
        unit_NVD = unit_rows(project_all(self.encoder, self.head, inputs.views))
        frozen = inputs.step < self.config.frozen_steps
        cosines_NVK = self.prototypes(unit_NVD.flatten(0, 1), frozen).unflatten(
            0, unit_NVD.shape[:2]
        )
        return Outputs({"cosines": cosines_NVK}, {"projections": unit_NVD[:, :LARGE].detach()})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy of the codes of both large views with all other views; ln K by chance.
        See :meth:`Objective.loss`."""
        cosines_NVK, config = outputs.rows["cosines"], self.config
        logs_NVK = (cosines_NVK / config.temperature).log_softmax(2)
        losses, hits = [], []
        for view in range(LARGE):
            code_NK = sinkhorn(
                cosines_NVK[:, view].detach(),
                config.epsilon,
                config.iterations,
                self._queued(view, step, len(cosines_NVK)),
            ).to(logs_NVK.dtype)
            others_NVK = torch.cat([logs_NVK[:, :view], logs_NVK[:, view + 1 :]], 1)
            losses.append(-(code_NK[:, None] * others_NVK).sum(2).mean(1))
            same_NV = others_NVK.detach().argmax(2) == code_NK.argmax(1)[:, None]
            hits.append(same_NV.to(logs_NVK.dtype).mean(1))
        of_both = [torch.stack(each).mean(0) for each in (losses, hits)]
        value, top1 = global_mean(torch.stack(of_both, 1))
        return Loss(value, {"cluster_top1": top1.detach()})

    def _queued(self, view: int, step: int, images: int) -> torch.Tensor | None:
        """Cosines of the queue, or none; what tells is the same on all processes."""
        config = self.config
        pushed = step * images * rank_and_size()[1]
        if not config.queue or step < config.queue_from or pushed < config.queue:
            return None
        return self.prototypes.of(cast(KeyQueue, self.queues[view]).rows)

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections of the large views, ``(2*N, D)``."""
        return outputs.fixed["projections"].transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Remember what was projected."""
        for view, queue in enumerate(self.queues):
            unit_BD = gather_rows(outputs.fixed["projections"][:, view].contiguous())
            cast(KeyQueue, queue).push(unit_BD, skipped)
