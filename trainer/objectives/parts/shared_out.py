"""A whole data set shared out among prototypes, by Sinkhorn's algorithm (Cuturi 2013) on logits.

Asano et al. 2020 (SeLa, arXiv 1911.05371), section 3.2. Shapes: R rows of this process, K
prototypes, D dimensions.
"""

import torch

from trainer.objectives.parts.global_sum import global_sum

_BLOCK = 1 << 22  # logits at a time, in float64
EQUAL = 0.1
"""By how much of an equal share a prototype's may be off in the end."""


@torch.no_grad()
def shared_out(
    own_RD: torch.Tensor, prototypes_KD: torch.Tensor, sharpness: float, iterations: int
) -> torch.Tensor:
    """The prototype of each of this process's rows, int64 ``(R,)``: near ones, so that all get
    about equal shares of all processes' rows. A collective of K numbers for each iteration.

    Logits are made again in each iteration, a block at a time: of a whole set they are too many.

    Args:
        own_RD: unit rows.
        prototypes_KD: unit rows, the same on all processes.
        sharpness: what cosines are multiplied by, up to 350: shares are as its exponential.
        iterations: at most; it ends where no share is off by more than :data:`EQUAL`.
    """
    count, kinds = own_RD.shape[0], prototypes_KD.shape[0]
    total = global_sum(torch.tensor(float(count), dtype=torch.float64, device=own_RD.device))
    offsets_K = torch.zeros(kinds, dtype=torch.float64, device=own_RD.device)
    parts = own_RD.split(max(1, _BLOCK // kinds))
    for _ in range(iterations):
        sums_K = torch.zeros_like(offsets_K)
        for part in parts:
            logits_RK = sharpness * (part @ prototypes_KD.T).double()
            sums_K += (logits_RK + offsets_K).softmax(1).sum(0)
        shares_K = global_sum(sums_K) * kinds / total
        if (shares_K - 1).abs().max() < EQUAL:
            break
        offsets_K -= shares_K.log()
    found = [
        (sharpness * (part @ prototypes_KD.T).double() + offsets_K).argmax(1) for part in parts
    ]
    return torch.cat([own_RD.new_empty(0, dtype=torch.int64), *found])
