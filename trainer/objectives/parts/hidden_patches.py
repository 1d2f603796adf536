"""Which patches of views a transformer does not see, and is asked about.

Shapes: R views, P patches in a square grid, M of them that may be hidden, E draws.
"""

from typing import NamedTuple

import torch

from trainer.objectives.parts.masks import BLOCK_DRAWS, block_order

PATCH_DRAWS = 2 + BLOCK_DRAWS
"""Of each view."""


class HiddenPatches(NamedTuple):
    """Of some views."""

    is_hidden_RP: torch.Tensor  # noqa: N815
    asked_RM: torch.Tensor  # noqa: N815
    """int64 numbers of those that may be, as many of each view."""
    weight_RM: torch.Tensor  # noqa: N815
    """Where they are, 1 over the number of the view's; else 0."""


def hide_patches(
    draws_RE: torch.Tensor, grid: int, shares: tuple[float, float], views: float
) -> HiddenPatches:
    """Blocks of patches (BEiT's masks, as iBOT has them, arXiv 2111.07832).

    Args:
        draws_RE: in [0, 1), :data:`PATCH_DRAWS` of each view.
        grid: patches along a side.
        shares: least and greatest share of a view's patches; at least one is hidden.
        views: share of views of which any are.
    """
    least, most = shares
    largest = max(1, round(most * grid**2))
    count_R1 = ((least + (most - least) * draws_RE[:, :1]) * grid**2).round().clamp(1, largest)
    count_R1 = torch.where(draws_RE[:, 1:2] < views, count_R1, 0)
    order_RP = block_order(draws_RE[:, 2:], grid)
    places = torch.arange(order_RP.shape[1], device=order_RP.device)
    is_hidden_RP = torch.zeros_like(order_RP, dtype=torch.bool)
    is_hidden_RP = is_hidden_RP.scatter(1, order_RP, places < count_R1)
    weight_RM = (places[:largest] < count_R1) / count_R1.clamp(min=1)
    return HiddenPatches(is_hidden_RP, order_RP[:, :largest], weight_RM)
