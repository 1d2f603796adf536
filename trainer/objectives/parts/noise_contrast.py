"""Noise-contrastive estimate of a softmax over all samples of a data set.

Wu et al. 2018, arXiv 1805.01978, section 3.2. Shapes: N images of this process, K rows that are
drawn, C = 1 + K logits of each image, D dimensions.
"""

import math

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from kernels.ntxent.reference import unit_rows
from trainer.objectives.parts.global_mean import global_mean


class NoiseContrast(nn.Module):
    """Is a row the image's own, or was it drawn? The softmax's normaliser is that of the first
    batch, and a constant from then on.

    Args:
        samples: of the data set, which rows are drawn from alike.
        negatives: K.
        temperature: divides the cosine similarities.
    """

    log_z: torch.Tensor

    def __init__(self, samples: int, negatives: int, temperature: float) -> None:
        super().__init__()
        self.samples, self.negatives, self.temperature = samples, negatives, temperature
        self.register_buffer("log_z", torch.tensor(torch.inf))  # until there was a batch

    def forward(
        self,
        rows_ND: torch.Tensor,
        own_ND: torch.Tensor,
        others_KD: torch.Tensor,
        is_own_NK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss over the images of all processes, and the share of those nearest to their
        own row. A collective.

        Args:
            rows_ND: of the images.
            own_ND: what is remembered of them.
            others_KD: what was drawn.
            is_own_NK: where what was drawn is the own row: it is no other to be nearer to.
        """
        logits_NC = self._logits(rows_ND, own_ND, others_KD)
        log_odds_NC = logits_NC - self._normaliser(logits_NC)
        log_odds_NC = log_odds_NC - math.log(self.negatives / self.samples)
        losses_N = -logsigmoid(log_odds_NC[:, 0]) - logsigmoid(-log_odds_NC[:, 1:]).sum(1)
        others_NK = logits_NC[:, 1:].masked_fill(is_own_NK, -torch.inf)
        hits_N = (logits_NC[:, 0] > others_NK.amax(1)).to(losses_N.dtype)
        value, top1 = global_mean(torch.stack([losses_N, hits_N], 1))
        return value, top1.detach()

    def _logits(
        self, rows_ND: torch.Tensor, own_ND: torch.Tensor, others_KD: torch.Tensor
    ) -> torch.Tensor:
        """The own row's first."""
        unit_ND = unit_rows(rows_ND)
        own_ND, others_KD = (unit_rows(each).to(unit_ND.dtype) for each in (own_ND, others_KD))
        own_N1 = (unit_ND * own_ND).sum(1, keepdim=True)
        return torch.cat([own_N1, unit_ND @ others_KD.T], 1) / self.temperature

    def _normaliser(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """The logarithm of Z."""
        (mean,) = global_mean(logits_NC.detach().double().exp().mean(1, keepdim=True))
        first = (mean * self.samples).log().to(self.log_z.dtype)
        return torch.where(self.log_z.isinf(), first, self.log_z).to(logits_NC.dtype)

    @torch.no_grad()
    def keep(
        self,
        rows_ND: torch.Tensor,
        own_ND: torch.Tensor,
        others_KD: torch.Tensor,
        skipped: torch.Tensor,
    ) -> None:
        """Keep the first batch's normaliser. A collective.

        Args:
            rows_ND: of a step's images, as above.
            own_ND: as above.
            others_KD: as above.
            skipped: 0-d; where it is 1, nothing changes.
        """
        logits_NC = self._logits(rows_ND, own_ND, others_KD)
        found = self._normaliser(logits_NC).to(self.log_z.dtype)
        self.log_z.copy_(torch.where(skipped > 0, self.log_z, found))
