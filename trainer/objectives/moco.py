"""MoCo v1 and v2: a query's key attracts, a queue of keys of past batches repels.

He et al. 2020, arXiv 1911.05722, algorithm 1; v2 (arXiv 2003.04297) is the same with another head,
temperature, augmentation and schedule. The first view of an image is the query, the second the key.

Shapes: N images of this process, B = N W of the global batch, V = 2 views, K queue rows, D
projection dimensions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.collectives import gather_rows, rank_and_size
from kernels.ntxent import Implementation, info_nce
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, info_nce_cost
from trainer.objectives.parts.key_encoder import KeyEncoder, MomentumSchedule, momentum_at
from trainer.objectives.parts.key_queue import KeyQueue
from trainer.objectives.parts.shuffle import batch_permutation, inverse, permute_rows


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(ObjectiveConfig):
    """InfoNCE against a queue; the defaults are v2's for ImageNet."""

    name: tyro.conf.Suppress[Literal["moco"]] = "moco"
    """Which objective a saved configuration describes."""
    temperature: float = 0.2
    """Divides the cosine similarities; v1 uses 0.07."""
    queue: int = 65536
    """K: keys of past batches that are negatives; any number, whatever the batch."""
    momentum: float = 0.999
    """Of the key encoder: the share of its weights that a step keeps, in [0, 1]."""
    momentum_schedule: MomentumSchedule = "constant"
    """cosine: from `momentum` at the first step to 1 at the end."""
    key_batch_norm: Literal["shuffle", "sync"] = "shuffle"
    """Statistics of the key encoder's BatchNorm: shuffle takes each process's own over images that
    were permuted across processes (the paper); sync takes the global batch's. Only sync, together
    with --sync-batch-norm for the query encoder, is the same run on any number of processes."""
    loss_implementation: Implementation = "auto"
    """reference holds all logits of a process; blocked and triton never do."""

    def __post_init__(self) -> None:
        bounds = {"temperature": "(0, inf)", "queue": "[1, 1e9]", "momentum": "[0, 1]"}
        check_bounds(self, "--objective.", **bounds)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "MoCo":
        """Encoder and head, their averages and the queue."""
        return MoCo(encoder, ProjectionHead(encoder.feature_dim, head), self, given.seed)

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE with the queue, and shuffled images."""
        cost = info_nce_cost(step.local_batch, self.queue + 1, step.dim, self.loss_implementation)
        shuffled = 3 * step.side**2 + step.dim if self.key_batch_norm == "shuffle" else 0
        return cost._replace(exchanged=shuffled)

    def compares(self, batch: int, num_samples: int) -> str:
        """An image with its key and the queue."""
        return f"{1 + self.queue} logits per image"


class MoCo(Objective):
    """Query encoder and head, their moving averages, and the queue.

    The encoder of the queries is handed on. ``seed`` decides the permutations that shuffle keys.
    """

    config: MoCoConfig

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: MoCoConfig, seed: int
    ) -> None:
        super().__init__(encoder, head, config)
        self.key = KeyEncoder(encoder, head)
        self.queue = KeyQueue(config.queue, head.out_dim)
        self.seed = seed

    def forward(self, inputs: Inputs) -> Outputs:
        """``queries`` and ``keys``, ``(N, D)``, not normalised."""
        query_images, key_images = inputs.views[0]
        queries_ND = self.head(self.encoder(query_images))
        return Outputs({"queries": queries_ND}, {"keys": self._keys(key_images, inputs.step)})

    @torch.no_grad()
    def _keys(self, images_NCHW: torch.Tensor, step: int) -> torch.Tensor:
        if self.config.key_batch_norm == "sync":
            keys_ND: torch.Tensor = self.key(images_NCHW)
            return keys_ND
        # A query and its key must not share statistics by which to know each other (section 3.3).
        permutation = batch_permutation(self.seed, step, len(images_NCHW) * rank_and_size()[1])
        shuffled_ND = self.key(permute_rows(images_NCHW, permutation))
        return permute_rows(shuffled_ND, inverse(permutation))

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """InfoNCE of each query against its key and the queue; see :meth:`Objective.loss`."""
        value, top1 = info_nce(
            outputs.rows["queries"],
            outputs.fixed["keys"],
            self.config.temperature,
            queue_QD=self.queue.rows,
            implementation=self.config.loss_implementation,
        )
        return Loss(value, {"contrastive_top1": top1})

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The queries, ``(N, D)``."""
        return outputs.rows["queries"]

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Move the key encoder and enqueue the keys of all processes, in the order of samples."""
        config = self.config
        momentum = momentum_at(config.momentum, config.momentum_schedule, step + 1, total_steps)
        self.key.follow(self.encoder, self.head, momentum, skipped)
        self.queue.push(unit_rows(gather_rows(outputs.fixed["keys"])), skipped)

    def synchronised_parts(self, sync_batch_norm: bool) -> list[nn.Module]:
        """The query's networks by the run's setting, the key's by ``key_batch_norm``."""
        parts: list[nn.Module] = [self.encoder, self.head] if sync_batch_norm else []
        return [*parts, self.key] if self.config.key_batch_norm == "sync" else parts

    def caveats(self, sync_batch_norm: bool) -> list[str]:
        """Statistics of a process, and a shuffle that moves nothing."""
        lines = []
        if not sync_batch_norm or self.config.key_batch_norm == "shuffle":
            lines.append(
                "BatchNorm statistics are those of one process, as in MoCo's paper: another number"
                " of processes gives another run. --sync-batch-norm --objective.key-batch-norm sync"
                " makes it the same"
            )
        if self.config.key_batch_norm == "shuffle" and rank_and_size()[1] == 1:
            lines.append(
                "--objective.key-batch-norm shuffle needs several processes: on one, queries and"
                " keys take their statistics from the same images"
            )
        return lines
