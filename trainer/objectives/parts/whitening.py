"""Principal components of unit variance, of rows of which every process holds its own.

Shapes: R rows of this process, F features, C components.
"""

import torch

from kernels.ntxent.reference import unit_rows
from trainer.objectives.parts.global_sum import global_sum

_BLOCK = 1 << 24  # features at a time, in float64
_NOTHING = 1e-7  # of the largest variance: what is left of float32's rounding


@torch.no_grad()
def whitened(own_RF: torch.Tensor, components: int) -> torch.Tensor:
    """Unit rows ``(R, C)`` in the features' dtype, before which the components of all processes'
    rows have variance 1; those without any are 0. A collective of F x F numbers.

    Caron et al. 2018 (DeepCluster, arXiv 1807.05520), section 4.1.

    Args:
        own_RF: this process's.
        components: C, of the greatest variance; at most F are there.
    """
    features = own_RF.shape[1]
    parts = own_RF.split(max(1, _BLOCK // features))
    sums_E = torch.zeros(features + 1, dtype=torch.float64, device=own_RF.device)
    for part in parts:
        sums_E[:-1] += part.double().sum(0)
    sums_E[-1] = len(own_RF)
    sums_E = global_sum(sums_E)
    mean_F, count = sums_E[:-1] / sums_E[-1], sums_E[-1]
    products_FF = torch.zeros(features, features, dtype=torch.float64, device=own_RF.device)
    for part in parts:
        centred_RF = part.double() - mean_F
        products_FF += centred_RF.T @ centred_RF
    variances_F, axes_FF = torch.linalg.eigh(global_sum(products_FF) / count)
    variances_C, axes_FC = variances_F[-components:], axes_FF[:, -components:]
    scale_C = torch.where(variances_C > _NOTHING * variances_F[-1], variances_C, torch.inf).rsqrt()
    found = [unit_rows((part.double() - mean_F) @ (axes_FC * scale_C)) for part in parts]
    return torch.cat([own_RF[:0, : len(scale_C)], *(each.to(own_RF.dtype) for each in found)])
