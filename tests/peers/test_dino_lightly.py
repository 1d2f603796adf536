"""DINO's loss, gradient and centre beside lightly's."""

import torch
from lightly.loss import DINOLoss

from tests.trainer.objectives.test_dino import KINDS, VIEWS, _objective, _outputs, _rows


def test_loss_gradient_and_centre_are_lightlys() -> None:
    objective, cosines, taught = _objective(), _rows(0, VIEWS).requires_grad_(), _rows(1, 2)
    objective.centre.zero_()
    theirs = DINOLoss(
        output_dim=KINDS,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=0,
        student_temp=0.1,
        center_momentum=0.9,
    )
    expected = theirs(list(taught.unbind(1)), list(cosines.unbind(1)), teacher_temp=0.07)
    outputs = _outputs(cosines, taught)
    found = objective.loss(outputs, 30).value
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(each, cosines)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
    objective.after_step(outputs, 30, 100, torch.zeros(()))
    ours, center = objective.centre, theirs.center.flatten().to(objective.centre.dtype)
    torch.testing.assert_close(ours, center, rtol=1e-5, atol=1e-7)
