"""LARS one tensor at a time, in plain torch and any floating dtype: the oracle of the kernels."""

from collections.abc import Sequence

import torch

from kernels.lars import Settings


def trust_ratio(weight: torch.Tensor, grad: torch.Tensor, settings: Settings) -> torch.Tensor:
    """``eta |w| / |g + wd w|``, or "you"'s ``eta |w| / (|g| + wd |w| + eps)``; 0-d.

    1 where |w| is 0 or the gradient's norm, with decay. 0 for "you" where |g| is 0: its peers leave
    such a tensor as it is, undecayed.
    """
    weight_norm = weight.norm()
    if settings.variant == "you":
        grad_norm = grad.norm()
        denominator = grad_norm + settings.weight_decay * weight_norm + settings.eps
    else:
        grad_norm = denominator = (grad + settings.weight_decay * weight).norm()
    adapt = (weight_norm > 0) & (grad_norm > 0)
    ratio = settings.trust_coefficient * weight_norm / denominator
    ratio = torch.where(adapt, ratio, torch.ones_like(ratio))
    return ratio * (grad_norm != 0) if settings.variant == "you" else ratio


@torch.no_grad()
def lars_reference_(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor] | None,
    settings: Settings,
    *,
    adapt: bool,
    found_inf: torch.Tensor | None = None,
) -> None:
    """As :func:`kernels.lars.lars_update_`."""
    for number, (weight, grad) in enumerate(zip(weights, grads)):
        update = grad.to(weight.dtype)
        if adapt:
            ratio = trust_ratio(weight, update, settings)
            update = ratio * (update + settings.weight_decay * weight)
        rate = settings.lr
        if settings.variant == "simclr":
            update, rate = settings.lr * update, 1.0
        step = update
        if momenta is not None:
            velocity = settings.momentum * momenta[number] + update
            step = settings.momentum * velocity + update if settings.nesterov else velocity
            _set(momenta[number], velocity, found_inf)
        _set(weight, weight - rate * step, found_inf)


def _set(tensor: torch.Tensor, value: torch.Tensor, found_inf: torch.Tensor | None) -> None:
    tensor.copy_(value if found_inf is None else torch.where(found_inf == 0, value, tensor))
