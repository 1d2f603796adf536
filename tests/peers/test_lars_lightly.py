"""LARS, variant "you", against lightly's, on a real network through warm-up and cosine.

Needs the `bench` extra.
"""

import pytest
import torch
import torchvision
from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811
from torch import nn

from trainer.optim.optimizers import OptimConfig, build_optimizer, set_lr
from trainer.optim.schedule import ScheduleConfig, lr_factor


def _network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=8).double()


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
def test_you_equals_lightlys_lars(nesterov: bool) -> None:
    ours, theirs = _network(), _network()
    config = OptimConfig(variant="you", weight_decay=1e-4, nesterov=nesterov)
    optimizer = build_optimizer(ours, config)
    peer = LightlyLARS(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.0,
        momentum=0.9,
        nesterov=nesterov,
        trust_coefficient=1e-3,
        eps=1e-8,
    )
    schedule = ScheduleConfig(warmup_epochs=10)
    for step in range(50):
        lr = 4.8 * lr_factor(schedule, step, 1, 50)
        theirs.zero_grad()
        theirs(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().mean().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad  # of one network: through two, rounding would grow from step to step
        if step % 3 == 2:
            next(theirs.parameters()).grad.zero_()  # then neither decays the weight
        for each in (optimizer, peer):
            set_lr(each, lr)
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = next(ours.parameters()) - next(_network().parameters())
    assert moved.abs().max() > 1e-3
