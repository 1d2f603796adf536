"""Principal components of unit variance, of rows of which every process holds its own.

Shapes: R rows of this process, B of a part, F features, C components.
"""

from collections.abc import Sequence

import torch

from common.collectives import rank_and_size
from common.errors import NumericalError
from kernels.ntxent.reference import unit_rows
from trainer.objectives.parts.global_sum import global_sum

_NOTHING = 1e-7  # of the largest variance: what is left of float32's rounding


@torch.no_grad()
def whitened(parts: Sequence[torch.Tensor], components: int) -> torch.Tensor:
    """Unit rows ``(R, C)`` in the features' dtype, before which the components of all processes'
    rows have variance 1; those without any are 0. A collective of F x F numbers.

    Caron et al. 2018 (DeepCluster, arXiv 1807.05520), section 4.1.

    Args:
        parts: ``(B, F)`` each, this process's rows, as they came: one copy of them is enough.
        components: C, of the greatest variance; at most F are there.

    Raises:
        NumericalError: on all processes, a feature of some is not finite.
    """
    features, device = parts[0].shape[1], parts[0].device
    sums_E = torch.zeros(features + 1, dtype=torch.float64, device=device)
    for part_BF in parts:
        sums_E[:-1] += part_BF.double().sum(0)
        sums_E[-1] += len(part_BF)
    sums_E = global_sum(sums_E)
    mean_F, count = sums_E[:-1] / sums_E[-1], sums_E[-1]
    products_FF = torch.zeros(features, features, dtype=torch.float64, device=device)
    for part_BF in parts:
        centred_BF = part_BF.double() - mean_F
        products_FF += centred_BF.T @ centred_BF
    products_FF = global_sum(products_FF)
    if not products_FF.isfinite().all():
        raise NumericalError(
            "features that are to be clustered are not finite; lower --optim.base-lr"
        )
    variances_F, axes_FF = torch.linalg.eigh(products_FF / count)
    # Axes of equal variances turn freely, otherwise on another processor.
    own_FE = torch.cat([axes_FF, variances_F[:, None]], 1)
    axes_FE = global_sum(own_FE if rank_and_size()[0] == 0 else torch.zeros_like(own_FE))
    variances_C, axes_FC = axes_FE[-components:, -1], axes_FE[:, :-1][:, -components:]
    scale_C = torch.where(variances_C > _NOTHING * variances_C[-1], variances_C, torch.inf).rsqrt()
    found = (unit_rows((part_BF.double() - mean_F) @ (axes_FC * scale_C)) for part_BF in parts)
    return torch.cat([rows_BC.to(part_BF.dtype) for rows_BC, part_BF in zip(found, parts)])
