"""What an average of the networks says of all images, which is taken off what it says of one.

Caron et al. 2021, arXiv 2104.14294, section 3.1. Shapes: R rows of this process, K directions.
"""

import torch

from common.collectives import rank_and_size, sum_ranks


@torch.no_grad()
def move_centre(
    centre_K: torch.Tensor, taught: torch.Tensor, momentum: float, skipped: torch.Tensor
) -> None:
    """Move it towards the mean of what all processes are taught. A collective.

    Args:
        centre_K: is written to.
        taught: ``(..., K)``, as many on every process.
        momentum: the share of it that a step keeps.
        skipped: 0-d; where it is 1, nothing changes.
    """
    taught_RK = taught.to(centre_K.dtype).flatten(0, -2)
    mean_K = sum_ranks(taught_RK.sum(0)) / (len(taught_RK) * rank_and_size()[1])
    centre_K.copy_(torch.where(skipped > 0, centre_K, centre_K.lerp(mean_K, 1 - momentum)))
