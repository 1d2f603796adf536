"""Other libraries' NT-Xent, value and gradient, against ours on one process.

Needs the `bench` extra (``pip install --no-deps lightly lightly-utils pytorch-metric-learning``);
``make test-all`` installs it.
"""

from collections.abc import Callable

import pytest
import torch

from kernels.ntxent import nt_xent

Loss = Callable[[torch.Tensor, float], torch.Tensor]


def _lightly(z_VBD: torch.Tensor, temperature: float) -> torch.Tensor:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)(z_VBD[0], z_VBD[1])


def _metric_learning(z_VBD: torch.Tensor, temperature: float) -> torch.Tensor:
    from pytorch_metric_learning.losses import NTXentLoss

    labels = torch.arange(z_VBD.shape[1]).repeat(2)
    return NTXentLoss(temperature=temperature)(z_VBD.flatten(0, 1), labels)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("peer", [_lightly, _metric_learning])
def test_value_and_gradient_are_those_of(peer: Loss, temperature: float) -> None:
    z = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    z[1] = 0.7 * z[0] + 0.3 * z[1]
    theirs, ours = (z.clone().requires_grad_() for _ in range(2))
    their_loss = peer(theirs, temperature)
    our_loss, _ = nt_xent(ours, temperature)
    their_loss.backward()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
