"""Supervised contrastive learning beside pytorch-metric-learning's, in float64."""

import torch
from pytorch_metric_learning.losses import SupConLoss

from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Outputs
from trainer.objectives.supcon import SupCon, SupConConfig


def test_loss_and_gradient_are_pytorch_metric_learnings() -> None:
    config = SupConConfig(temperature=0.2, loss_implementation="blocked")
    head = ProjectionHead(64, HeadConfig(hidden_dim=64, out_dim=16))
    ours = SupCon(small_encoder(), head, config, 5)  # type: ignore[arg-type]
    z = torch.randn(24, 2, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(24) % 5
    value = ours.loss(Outputs({"projections": z}, {"labels": labels}), 0).value
    theirs = SupConLoss(temperature=0.2)(z.transpose(0, 1).flatten(0, 1), labels.repeat(2))
    torch.testing.assert_close(value, theirs, rtol=1e-9, atol=1e-9)
    (mine,) = torch.autograd.grad(value, z)
    (other,) = torch.autograd.grad(theirs, z)
    torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)
