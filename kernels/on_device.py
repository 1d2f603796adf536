"""Launching on the GPU that holds a tensor, and getting one there."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def to_device(values: torch.Tensor | npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Host to device without waiting: a copy from pageable memory would wait for the stream."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
