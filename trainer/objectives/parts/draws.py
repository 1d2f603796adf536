"""Numbers of samples, drawn where the images are: the host is not to wait for their ids.

Shapes: N images of this process, K draws of each.
"""

import math

import torch

from common.randomness import Stream, uniforms_on_device


def uniform_draws(
    seed: int, step: int, ids_N: torch.Tensor, stream: Stream, count: int
) -> torch.Tensor:
    """K uniform numbers of each sample in [0, 1), float64 ``(N, K)``, by step and not by epoch.

    Args:
        seed: the run's.
        step: optimizer steps done before this one.
        ids_N: int64 sample ids.
        stream: what is drawn.
        count: K.
    """
    numbers_K = torch.arange(count, device=ids_N.device)
    streams_1 = torch.full_like(numbers_K[:1], int(stream))
    return uniforms_on_device(seed, step, ids_N, numbers_K, streams_1)[..., 0].T


def normal_draws(
    seed: int, step: int, ids_N: torch.Tensor, stream: Stream, count: int
) -> torch.Tensor:
    """K standard normal numbers of each sample, float64 ``(N, K)`` (Box & Muller 1958)."""
    half = -(-count // 2)
    angle, radius = uniform_draws(seed, step, ids_N, stream, 2 * half).split(half, 1)
    radius, angle = (-2 * (1 - radius).log()).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def drawn(
    seed: int, step: int, ids_N: torch.Tensor, stream: Stream, count: int, number: int = 0
) -> torch.Tensor:
    """K of these samples, int64 ``(K,)``, by the draws of this number."""
    draws_N = uniform_draws(seed, step, ids_N, stream, number + 1)[:, number]
    return ids_N[draws_N.argsort(stable=True)[:count]]
