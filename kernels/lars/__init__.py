"""LARS updates of many tensors at once; :mod:`trainer.optim.lars` holds the optimizer around them.

========== ===================================== ==============================================
reference  ``reference.py``, any device, dtype   one tensor at a time; the oracle
triton     ``triton_kernels.py``, CUDA, float32  three launches for all tensors of a group
========== ===================================== ==============================================

There is no third: where Triton does not run, the optimizer's own foreach operations are faster than
the reference. :func:`kernels.multi_tensor.obstacle` says whether it runs, and if not, why.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from kernels.lars.reference import Settings, Variant, lars_reference_
from kernels.multi_tensor import check_alike, obstacle

__all__ = ["Implementation", "Settings", "Variant", "lars_update_"]

Implementation = Literal["reference", "triton"]


@torch.no_grad()
def lars_update_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    settings: Settings,
    *,
    adapt: bool,
    found_inf: torch.Tensor | None = None,
    implementation: Implementation = "triton",
) -> None:
    """One step of LARS on tensors of one device and dtype, in place; the host does not wait.

    Args:
        weights: to update; dense. float32 for "triton".
        grads: theirs, of the same shapes and memory layouts; left as they are. For "triton"
            float32, bfloat16 or float16, all alike.
        momenta: velocities, to update, of the dtype of the weights; None where momentum is 0.
        settings: of the step.
        adapt: with trust ratio and weight decay; without either for biases and BatchNorm.
        found_inf: float32 of one element; where it is not 0 nothing is written.
        implementation: "reference" or "triton".

    Raises:
        ValueError: tensors are not as said, or the implementation does not run here.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"lars: no implementation {implementation!r}")
    if momenta is None and settings.momentum:
        raise ValueError(f"lars: momentum {settings.momentum} needs momenta")
    if not weights:
        return
    lists = [weights, grads] if momenta is None else [weights, grads, momenta]
    check_alike(lists, "lars")
    if implementation == "reference":
        lars_reference_(weights, grads, momenta, settings, adapt=adapt, found_inf=found_inf)
        return
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
