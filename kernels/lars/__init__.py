"""LARS updates of many tensors at once by Triton, in three launches for all tensors of a group.

:mod:`trainer.optim.lars` holds the optimizer around them, whose own foreach operations serve where
Triton does not run: :func:`kernels.multi_tensor.obstacle` says whether it does, and if not, why.
"""

from collections.abc import Sequence

import torch

from kernels.lars.settings import Settings, Variant
from kernels.multi_tensor import check_alike, obstacle

__all__ = ["Settings", "Variant", "lars_update_"]


@torch.no_grad()
def lars_update_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    settings: Settings,
    *,
    adapt: bool,
    found_inf: torch.Tensor | None = None,
) -> None:
    """One step of LARS on tensors of one device and dtype, in place; the host does not wait.

    Args:
        weights: to update; dense, float32.
        grads: theirs, of the same shapes and memory layouts; left as they are. float32, bfloat16
            or float16, all alike.
        momenta: velocities, to update, float32; None where momentum is 0.
        settings: of the step.
        adapt: with trust ratio and weight decay; without either for biases and BatchNorm.
        found_inf: float32 of one element; where it is not 0 nothing is written.

    Raises:
        ValueError: tensors are not as said, or Triton does not run here.
    """
    if momenta is None and settings.momentum:
        raise ValueError(f"lars: momentum {settings.momentum} needs momenta")
    if not weights:
        return
    lists = [weights, grads] if momenta is None else [weights, grads, momenta]
    check_alike(lists, "lars")
    hindrance = _first_obstacle(weights, grads, momenta)
    if hindrance:
        raise ValueError(f"lars: implementation 'triton' cannot run: {hindrance}")
    from kernels.lars.triton_kernels import lars_triton_

    lars_triton_(weights, grads, momenta, settings, adapt=adapt, found_inf=found_inf)


def _first_obstacle(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
) -> str:
    for weight, grad in zip(weights, grads):
        if found := obstacle(weight, grad):
            return found
    if momenta is not None and momenta[0].dtype != torch.float32:
        return f"momenta are {str(momenta[0].dtype)[6:]}, not float32"
    return ""
