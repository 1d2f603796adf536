"""SwAV's loss and gradient beside lightly's."""

import torch
from lightly.loss import SwaVLoss

from tests.trainer.objectives.test_swav import _cosines, _objective
from trainer.objectives.base import Outputs


def test_loss_and_gradient_are_lightlys() -> None:
    cosines = _cosines(40).requires_grad_()
    found = _objective().loss(Outputs({"cosines": cosines}), 0).value
    theirs = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    views = list(cosines.unbind(1))
    expected = theirs(views[:2], views[2:]).squeeze()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(each, cosines)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
