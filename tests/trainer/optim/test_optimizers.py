"""Optimizers: who is decayed, at which rate, and steps that are left out."""

import copy
import math
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from common.errors import ConfigError
from trainer.optim.lars import LARS
from trainer.optim.optimizers import (
    OptimConfig,
    apply_update,
    build_optimizer,
    gradient_norm,
    scaled_lr,
    set_lr,
)

CONFIGS = {
    "lars": OptimConfig(name="lars"),
    "sgd": OptimConfig(name="sgd", weight_decay=1e-2),
    "nesterov": OptimConfig(name="sgd", nesterov=True, weight_decay=1e-2),
    "sgd_without_momentum": OptimConfig(name="sgd", momentum=0.0),
    "adamw": OptimConfig(name="adamw", weight_decay=1e-2),
}


@pytest.mark.parametrize(
    ("scaling", "base_lr", "batch", "expected"),
    [
        ("linear", 0.3, 4096, 4.8),
        ("linear", 0.3, 256, 0.3),
        ("linear", 0.3, 64, 0.075),
        ("sqrt", 1.2, 4096, 4.8),
        ("sqrt", 1.2, 1024, 0.075 * 32),  # SimCLR's 0.075 sqrt(B)
        ("none", 0.03, 4096, 0.03),
    ],
)
def test_rate_scales_with_the_global_batch(
    scaling: Any, base_lr: float, batch: int, expected: float
) -> None:
    config = OptimConfig(base_lr=base_lr, lr_scaling=scaling)
    assert scaled_lr(config, batch) == pytest.approx(expected, rel=1e-12)


def test_vectors_are_not_decayed_downsample_norms_included() -> None:
    model = torchvision.models.resnet18()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    matrices, vectors = optimizer.param_groups
    assert (matrices["group_name"], vectors["group_name"]) == ("matrices", "vectors")
    assert matrices["weight_decay"] == 0.5
    assert vectors["weight_decay"] == 0.0
    assert "layer2.0.downsample.1.weight" in vectors["param_names"]
    assert {"conv1.weight", "fc.weight"} <= set(matrices["param_names"])
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert all(named[n] is p for n, p in zip(group["param_names"], group["params"]))
    assert len(matrices["params"]) + len(vectors["params"]) == len(named)


def test_moco_decays_vectors_too() -> None:
    optimizer = build_optimizer(
        nn.Linear(2, 2), OptimConfig(name="sgd", weight_decay=1e-4, decay_vectors=True)
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    (group,) = build_optimizer(model, OptimConfig()).param_groups
    assert group["param_names"] == ["bias"]
    model.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(model, OptimConfig())


def test_settings_reach_the_optimizer() -> None:
    config = OptimConfig(
        variant="mocov3", trust_coefficient=0.02, momentum=0.8, nesterov=True, eps=1e-5
    )
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert isinstance(optimizer, LARS)
    group = optimizer.param_groups[0]
    assert (group["variant"], group["trust_coefficient"]) == ("mocov3", 0.02)
    assert (group["momentum"], group["nesterov"], group["eps"]) == (0.8, True, 1e-5)
    sgd = build_optimizer(nn.Linear(2, 2), OptimConfig(name="sgd", nesterov=True)).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"]) == (0.9, True)
    adamw = build_optimizer(nn.Linear(2, 2), OptimConfig(name="adamw", betas=(0.8, 0.95)))
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)
    set_lr(adamw, 0.125)
    assert {group["lr"] for group in adamw.param_groups} == {0.125}


def _network() -> nn.Module:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    return network.to(memory_format=torch.channels_last)


def _backward(network: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    network.zero_grad()
    network(torch.randn(4, 3, 4, 4)).square().mean().backward()


def _spoil(network: nn.Module) -> None:
    list(network.parameters())[-1].grad[0] = math.nan  # type: ignore[index]


def _same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("before", [0, 2])
def test_skipped_step_leaves_parameters_and_state_to_the_bit(name: str, before: int) -> None:
    network, twin = _network(), _network()
    optimizers = [build_optimizer(module, CONFIGS[name]) for module in (network, twin)]
    for step in range(before):
        for module, optimizer in zip((network, twin), optimizers):
            _backward(module, step)
            apply_update(optimizer, 0.1, gradient_norm(optimizer))
    _backward(network, before)
    _spoil(network)
    skipped = apply_update(optimizers[0], 0.1, gradient_norm(optimizers[0]))
    assert skipped.item() == 1
    assert _same_bits(network, twin)
    for step in range(before, before + 3):  # state, step counts included, shows in what follows
        for module, optimizer in zip((network, twin), optimizers):
            _backward(module, step)
            assert apply_update(optimizer, 0.1, gradient_norm(optimizer)).item() == 0
        assert _same_bits(network, twin)
    assert not _same_bits(network, _network())


@pytest.mark.processors
@pytest.mark.parametrize("clip", [0.0, 0.8])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_guarded_steps_equal_torchs_plain_optimizers(name: str, clip: float) -> None:
    network, plain = _network(), _network()
    config = CONFIGS[name]
    optimizer = build_optimizer(network, config)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference: torch.optim.Optimizer
    if config.name == "sgd":
        reference = torch.optim.SGD(
            groups, lr=0.1, momentum=0.9, nesterov=config.nesterov, foreach=False
        )
    else:
        reference = torch.optim.AdamW(groups, lr=0.1, foreach=False)
    lengths = []
    for step in range(5):
        for module in (network, plain):
            _backward(module, step)
        if clip:
            lengths.append(float(nn.utils.clip_grad_norm_(plain.parameters(), clip)) > clip)
        apply_update(optimizer, 0.1, gradient_norm(optimizer), clip_norm=clip)
        reference.step()
    assert not clip or set(lengths) == {True, False}, "some are longer and some are not"
    for p, q in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_resume_from_contiguous_state_continues_to_the_bit(name: str) -> None:
    """Files keep no channels_last; the fused kernels would mix up the elements in silence."""
    network = _network()
    optimizer = build_optimizer(network, CONFIGS[name])
    _backward(network, 0)
    apply_update(optimizer, 0.1)
    state = copy.deepcopy(optimizer.state_dict())
    for slots in state["state"].values():
        slots.update({key: value.contiguous() for key, value in slots.items() if value is not None})
    resumed = copy.deepcopy(network)
    again = build_optimizer(resumed, CONFIGS[name])
    again.load_state_dict(state)
    for step in range(1, 4):
        for module, o in ((network, optimizer), (resumed, again)):
            _backward(module, step)
            apply_update(o, 0.1)
    assert _same_bits(network, resumed)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_gradients_in_another_layout_are_understood(name: str) -> None:
    ends = []
    for contiguous in (False, True):
        network = _network()
        optimizer = build_optimizer(network, CONFIGS[name])
        for step in range(2):
            _backward(network, step)
            for p in network.parameters():
                assert p.grad is not None
                p.grad = p.grad.contiguous() if contiguous else p.grad
            apply_update(optimizer, 0.1)
        ends.append(network)
    assert _same_bits(*ends)


def test_gradient_norm_is_that_of_all_gradients() -> None:
    network = _network()
    optimizer = build_optimizer(network, CONFIGS["lars"])
    _backward(network, 0)
    flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient_norm(optimizer), flat.norm())
    _spoil(network)
    assert not gradient_norm(optimizer).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": -0.1}, "--optim.base-lr"),
        ({"base_lr": math.nan}, "--optim.base-lr"),
        ({"weight_decay": math.inf}, "--optim.weight-decay"),
        ({"momentum": 1.0}, "--optim.momentum"),
        ({"betas": (0.9, 1.0)}, "--optim.betas"),
        ({"momentum": 0.0, "nesterov": True}, "--optim.nesterov"),
        ({"decay_vectors": True}, "LARS"),
        ({"clip_norm": 1.0}, "--optim.clip-norm does not go with LARS"),
        ({"name": "sgd", "clip_norm": -1.0}, "--optim.clip-norm"),
    ],
)
def test_bad_settings_name_their_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**options)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_weight_decay_of_its_own_step_reaches_matrices_alone(name: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(module, OptimConfig(name=name, weight_decay=0.0))
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-30)
    apply_update(optimizer, 0.1, weight_decay=0.5)
    assert {group["group_name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "matrices": 0.5,
        "vectors": 0.0,
    }


def test_vectors_that_decay_follow_the_schedule_too() -> None:
    module = nn.Linear(3, 2)
    config = OptimConfig(name="sgd", weight_decay=0.0, decay_vectors=True)
    optimizer = build_optimizer(module, config)
    apply_update(optimizer, 0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    apply_update(optimizer, 0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_what_is_steady_has_a_rate_of_its_own(name: Any) -> None:
    module = nn.ModuleDict(
        {"head": nn.Linear(3, 2), "tasks": nn.ModuleDict({"own": nn.Linear(3, 2)})}
    )
    optimizer = build_optimizer(module, OptimConfig(name=name, steady=("own",)))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    apply_update(optimizer, 0.0, gradient_norm(optimizer), steady_lr=0.1)
    moved = {name for name, value in module.named_parameters() if not value.equal(before[name])}
    assert moved == {"tasks.own.weight", "tasks.own.bias"}
    apply_update(optimizer, 0.2)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}


def test_a_steady_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--optim.steady predictor: nothing that is trained has"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(steady=("predictor",)))
