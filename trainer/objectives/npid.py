"""Instance discrimination: every image is a class of its own, and its row of a memory bank its
prototype.

Wu et al. 2018, arXiv 1805.01978: by a softmax over all samples or over the own row and K others, as
the authors' later code has it, or by the paper's noise-contrastive estimate.

Shapes: N images of this process, S samples of the data set, K negatives, D dimensions.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import tyro

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from kernels.augment import to_device
from kernels.ntxent import Implementation, info_nce
from kernels.ntxent.reference import unit_rows
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, info_nce_cost
from trainer.objectives.parts.noise_contrast import NoiseContrast
from trainer.objectives.parts.per_sample import Bits, PerSample


@dataclass(frozen=True, kw_only=True)
class MemoryBankConfig(ObjectiveConfig):
    """Softmax over a memory bank; the defaults are the paper's for ImageNet."""

    looks: ClassVar[int] = 1

    temperature: float = 0.07
    """Divides the cosine similarities; 0.1 on CIFAR-10."""
    negatives: int = 65536
    """K: rows of other samples that an image is compared with, drawn anew in each step and the same
    for the whole batch; 0: all samples. The paper's estimate takes 4096."""
    estimate: Literal["softmax", "nce"] = "softmax"
    """nce: whether a row is the image's own or noise, asked of each by itself (noise-contrastive
    estimate, with the normaliser of the first batch), as the paper has it. softmax does better."""
    momentum: float = 0.5
    """Of the bank: the share of a row that a step keeps, in [0, 1)."""
    memory_bits: Bits = 32
    """That a number of the bank takes; ImageNet's rows of 128 are 328 MB of 16 bits, on every
    process."""
    loss_implementation: Implementation = "auto"
    """reference holds all logits of a process; blocked and triton never do."""

    def __post_init__(self) -> None:
        bounds = {"temperature": "(0, inf)", "negatives": "[0, 1e9]", "momentum": "[0, 1)"}
        check_bounds(self, "--objective.", **bounds)
        if self.estimate == "nce" and not self.negatives:
            raise ConfigError("--objective.estimate nce wants --objective.negatives, such as 4096")

    def cost(self, step: StepSizes) -> LossCost:
        """InfoNCE with rows of the bank."""
        columns = self.negatives + 1 if self.negatives else step.num_samples
        # The estimate holds all logits.
        how = "reference" if self.estimate == "nce" else self.loss_implementation
        return info_nce_cost(step.local_batch, columns, step.dim, how)

    def compares(self, batch: int, num_samples: int) -> str:
        """An image with its own row and the negatives, or with all rows."""
        return f"{1 + self.negatives if self.negatives else num_samples} logits per image"


@dataclass(frozen=True, kw_only=True)
class NPIDConfig(MemoryBankConfig):
    """An image against the bank."""

    name: tyro.conf.Suppress[Literal["npid"]] = "npid"
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "NPID":
        """Encoder, head, and a bank of random directions."""
        built = ProjectionHead(encoder.feature_dim, head)
        return NPID(encoder, built, self, given)


class NPID(Objective):
    """Encoder, head and memory bank."""

    config: MemoryBankConfig

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, config: MemoryBankConfig, given: Given
    ) -> None:
        super().__init__(encoder, head, config)
        rows_SD = unit_rows(torch.randn(given.num_samples, head.out_dim))
        self.bank = PerSample(rows_SD, config.memory_bits)
        self.seed = given.seed
        if config.estimate == "nce":
            self.noise = NoiseContrast(given.num_samples, config.negatives, config.temperature)

    def forward(self, inputs: Inputs) -> Outputs:
        """``projections``, ``(N, D)``, not normalised, and whose they are."""
        projections_ND = self.head(self.encoder(inputs.views[0][0]))
        whose = {"ids": inputs.ids_N, "genuine": inputs.genuine_N}
        return Outputs({"projections": projections_ND}, whose)

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Of each image against its own row of the bank and the negatives'."""
        value, top1 = self._contrast(outputs.rows["projections"], outputs.fixed["ids"], step)
        return Loss(value, {"contrastive_top1": top1})

    def _contrast(
        self, rows_ND: torch.Tensor, ids_N: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of rows against the bank, and the share of those nearest to their own."""
        config = self.config
        if config.estimate == "nce":
            negative_K = self._negatives(step)
            own_ND, others_KD = self.bank.read(ids_N), self.bank.read(negative_K)
            value, top1 = self.noise(rows_ND, own_ND, others_KD, negative_K == ids_N[:, None])
            return value, top1
        sampled = config.negatives > 0
        return info_nce(
            rows_ND,
            self.bank.read(ids_N) if sampled else None,
            config.temperature,
            positive_M=None if sampled else ids_N,
            queue_QD=self.bank.read(self._negatives(step) if sampled else None),
            implementation=config.loss_implementation,
        )

    def embedding(self, outputs: Outputs) -> torch.Tensor:
        """The projections, ``(N, D)``."""
        return outputs.rows["projections"]

    @torch.no_grad()
    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """Move the rows of the batch's images towards what they were projected to."""
        ids_N, m = outputs.fixed["ids"], self.config.momentum
        new_ND, own_ND = unit_rows(outputs.rows["projections"]), self.bank.read(ids_N)
        if self.config.estimate == "nce":
            self.noise.keep(new_ND, own_ND, self.bank.read(self._negatives(step)), skipped)
        moved_ND = unit_rows(m * own_ND + (1 - m) * new_ND)
        self.bank.write(ids_N, moved_ND, outputs.fixed["genuine"], skipped)

    def _negatives(self, step: int) -> torch.Tensor:
        """Ids of this step's negatives, with repetition, the same on all processes."""
        keys_K = sample_keys(self.seed, step, np.arange(self.config.negatives), 0, Stream.NEGATIVE)
        ids_K = (uniforms(keys_K) * len(self.bank.rows)).astype(np.int64)
        return to_device(torch.from_numpy(ids_K), self.bank.rows.device)
