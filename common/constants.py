"""Constants where tensors are.

Copied from the host they would wait, in each step, for all that a GPU has in hand; filled in they
wait for nothing.
"""

from collections.abc import Sequence

import torch


def constants(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A few numbers ``(len(values),)`` in the dtype and on the device of ``like``."""
    return torch.stack([like.new_full((), value) for value in values])
