"""LARS against equations written out one tensor at a time."""

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from trainer.optim.lars import LARS, Variant
from trainer.optim.optimizers import apply_update, gradient_norm

VARIANTS: tuple[Variant, ...] = ("simclr", "mocov3", "you")
STEPS, WARMUP, PEAK = 50, 10, 4.8
MU, WD, ETA, EPS = 0.9, 1e-2, 1e-3, 1e-8  # a weight decay large enough to be seen

Layout = Literal["default", "channels_last"]


def _rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * step / WARMUP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def _tensors(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Convolution, matrix, 1x1 convolution, zero matrix, bias, scale, scalar; scales differ."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(4, 3, 3, 3), (5, 6), (4, 4, 1, 1), (3, 3), (6,), (4,), ()]
    tensors = [
        10.0 ** (index % 3 - 1) * torch.randn(shape, generator=generator, dtype=torch.float64)
        for index, shape in enumerate(shapes)
    ]
    tensors[3].zero_()
    return [t.to(dtype) for t in tensors]


def _gradients(dtype: torch.dtype, step: int) -> list[torch.Tensor]:
    gradients = _tensors(dtype, seed=1000 + step)
    gradients[3].add_(0.1 if step > 3 else 0.0)  # weight and gradient are both zero at first
    return gradients


def _reference_step(
    w: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float, variant: str, nesterov: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One tensor's new weight and velocity, from the papers' and repositories' equations."""
    u, ratio = g, 1.0
    if w.ndim > 1:
        u = g + WD * w
        w_norm = float(w.square().sum().sqrt())
        if variant == "you":
            g_norm = float(g.square().sum().sqrt())
            denominator = g_norm + WD * w_norm + EPS
        else:
            g_norm = denominator = float(u.square().sum().sqrt())
        if w_norm > 0 and g_norm > 0:
            ratio = ETA * w_norm / denominator
        elif variant == "you":
            u = g
    if variant == "simclr":  # google-research/simclr: scaled_lr = lr * ratio goes into the velocity
        v = MU * v + lr * ratio * u
        return w - (MU * v + lr * ratio * u if nesterov else v), v
    v = MU * v + ratio * u
    return w - lr * (MU * v + ratio * u if nesterov else v), v


def _parameters(dtype: torch.dtype, layout: Layout = "default") -> list[nn.Parameter]:
    parameters = [nn.Parameter(t) for t in _tensors(dtype)]
    if layout == "channels_last":
        for p in parameters:
            if p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)
    return parameters


def _lars(parameters: list[nn.Parameter], variant: Variant, **options: Any) -> LARS:
    settings: dict[str, Any] = {
        "lr": 0.0,
        "momentum": MU,
        "weight_decay": WD,
        "trust_coefficient": ETA,
        "eps": EPS,
    }
    return LARS(parameters, variant=variant, **(settings | options))


def _train(optimizer: LARS, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, _gradients(parameters[0].dtype, step)):
            parameter.grad = gradient
        apply_update(optimizer, _rate(step))


def _assert_same(got: list[Any], want: list[Any], **tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **tolerance)


def _state(optimizer: LARS, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in parameters]


@pytest.mark.processors
@pytest.mark.parametrize("layout", ["default", "channels_last"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_steps_of_warmup_and_cosine_follow_the_equations(
    variant: Variant, nesterov: bool, layout: Layout
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        parameters = _parameters(dtype, layout)
        optimizer = _lars(parameters, variant, nesterov=nesterov)
        _train(optimizer, parameters, range(STEPS))
        weights = _tensors(dtype)
        velocities = [torch.zeros_like(w) for w in weights]
        for step in range(STEPS):
            for i, g in enumerate(_gradients(dtype, step)):
                weights[i], velocities[i] = _reference_step(
                    weights[i], g, velocities[i], _rate(step), variant, nesterov
                )
        _assert_same(list(parameters), weights, rtol=tolerance, atol=tolerance)
        _assert_same(_state(optimizer, parameters), velocities, rtol=tolerance, atol=tolerance)


def test_the_placements_of_the_rate_differ_while_it_changes() -> None:
    ends = []
    for variant in ("simclr", "mocov3"):
        parameters = _parameters(torch.float64)
        _train(_lars(parameters, variant), parameters, range(STEPS))
        ends.append(parameters[0].detach())
    assert (ends[0] - ends[1]).norm() > 1e-2 * (ends[0] - _tensors(torch.float64)[0]).norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaling_the_gradient_does_not_change_the_step_of_a_matrix(variant: Variant) -> None:
    moved = []
    for scale in (1.0, 1e6):
        parameter = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        parameter.grad = scale * torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)
        _lars([parameter], variant, lr=1.0, weight_decay=0.0).step()
        moved.append(parameter.detach() - 1)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-7, atol=0)
    assert moved[0].norm() == pytest.approx(ETA * math.sqrt(6), rel=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_without_gradient_stay_as_they_are_however_long(variant: Variant) -> None:
    """As torch leaves a parameter without gradient. google-research/simclr and moco-v3 decay a
    gradient of zeros, at the trusted rate: frozen weights would lose a thousandth of their length
    in every step, to nothing."""
    frozen = nn.Parameter(torch.randn(3, 4))
    before = frozen.detach().clone()
    optimizer = _lars([frozen], variant, lr=2.0, weight_decay=1e-6)
    for _ in range(50):
        frozen.grad = torch.zeros_like(frozen)
        optimizer.step()
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_weights_leave_zero_and_zero_gradients_stay_finite(variant: Variant) -> None:
    zero_weight = nn.Parameter(torch.zeros(2, 2))
    zero_weight.grad = torch.ones(2, 2)
    zero_gradient = nn.Parameter(torch.ones(2, 2))
    zero_gradient.grad = torch.zeros(2, 2)
    both = nn.Parameter(torch.zeros(2, 2))
    both.grad = torch.zeros(2, 2)
    _lars([zero_weight, zero_gradient, both], variant, lr=0.5, weight_decay=0.0).step()
    assert torch.equal(zero_weight, torch.full((2, 2), -0.5))  # ratio 1, not 0
    assert torch.equal(zero_gradient, torch.ones(2, 2))
    assert torch.equal(both, torch.zeros(2, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_get_neither_ratio_nor_decay(variant: Variant) -> None:
    parameter = nn.Parameter(torch.full((3,), 7.0))
    parameter.grad = torch.ones(3)
    _lars([parameter], variant, lr=0.5, momentum=0.0).step()
    assert torch.equal(parameter, torch.full((3,), 6.5))


def test_groups_types_and_missing_gradients_may_be_mixed() -> None:
    def run(together: bool) -> list[torch.Tensor]:
        parameters = [*_parameters(torch.float64), *_parameters(torch.float32)]
        frozen = nn.Parameter(torch.ones(2, 2))
        groups = [
            {"params": [*parameters[::2], frozen], "lr": 0.1},
            {"params": parameters[1::2], "lr": 0.2, "weight_decay": 0.5},
        ]
        if together:
            optimizers = [_lars(groups, "simclr")]  # type: ignore[arg-type]
        else:
            optimizers = [
                _lars([p], "simclr", **{k: v for k, v in group.items() if k != "params"})
                for group in groups
                for p in group["params"]  # type: ignore[attr-defined]
            ]
        for step in range(3):
            for p, g in zip(parameters, _gradients(torch.float64, step) * 2):
                p.grad = g.to(p.dtype)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(frozen, torch.ones(2, 2))
        return [p.detach() for p in parameters]

    _assert_same(run(together=True), run(together=False), rtol=0, atol=0)


def test_norms_beyond_the_range_of_float16_are_no_infinity() -> None:
    parameter = nn.Parameter(torch.full((300, 300), 300.0, dtype=torch.float16))  # norm 90,000
    parameter.grad = torch.full_like(parameter, 150.0)
    optimizer = _lars([parameter], "mocov3", lr=0.0, weight_decay=0.0, trust_coefficient=1.0)
    optimizer.step()
    assert torch.equal(_state(optimizer, [parameter])[0], torch.full_like(parameter, 300.0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("before", [0, 3])
def test_skipped_step_changes_no_bit_of_parameters_or_momentum(
    variant: Variant, before: int
) -> None:
    """Also as the first step, when there is no momentum yet."""
    parameters = _parameters(torch.float32, "channels_last")
    optimizer = _lars(parameters, variant)
    _train(optimizer, parameters, range(1, 1 + before))
    undisturbed = copy.deepcopy(parameters)
    twin = _lars(undisturbed, variant)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else they share momentum

    for bad in (math.nan, math.inf):
        for p in parameters:
            p.grad = torch.randn_like(p)
        parameters[1].grad[2, 3] = bad  # type: ignore[index]
        skipped = apply_update(optimizer, 1.0, gradient_norm(optimizer))
        assert skipped.item() == 1
    for p, q in zip(parameters, undisturbed):
        assert torch.equal(p, q)
    _train(optimizer, parameters, range(5, 9))  # the momentum shows in what follows
    _train(twin, undisturbed, range(5, 9))
    for p, q in zip(parameters, undisturbed):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])


def test_finite_step_under_guard_is_the_plain_step() -> None:
    ends = []
    for guarded in (False, True):
        parameters = _parameters(torch.float32)
        optimizer = _lars(parameters, "simclr")
        for step in range(4):
            for p, g in zip(parameters, _gradients(torch.float32, step)):
                p.grad = g
            norm = gradient_norm(optimizer) if guarded else None
            assert apply_update(optimizer, 0.3, norm).item() == 0
        ends.append([p.detach() for p in parameters])
    _assert_same(ends[0], ends[1], rtol=0, atol=0)


def test_step_leaves_gradients_as_they_were() -> None:
    for variant in VARIANTS:
        parameters = _parameters(torch.float32)
        optimizer = _lars(parameters, variant)
        _train(optimizer, parameters, range(3, 4))
        _assert_same([p.grad for p in parameters], _gradients(torch.float32, 3), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["default", "channels_last"])
def test_resume_from_a_saved_state_continues_to_the_bit(layout: Layout) -> None:
    parameters = _parameters(torch.float32, layout)
    optimizer = _lars(parameters, "simclr")
    _train(optimizer, parameters, range(1, 4))
    state = copy.deepcopy(optimizer.state_dict())
    for slots in state["state"].values():  # files keep no memory layout
        slots["momentum_buffer"] = slots["momentum_buffer"].contiguous()
    resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
    again = _lars(resumed, "mocov3", momentum=0.5)  # overwritten by the state
    again.load_state_dict(state)
    _train(optimizer, parameters, range(4, 8))
    _train(again, resumed, range(4, 8))
    for p, q in zip(parameters, resumed):
        assert torch.equal(p, q)


def test_closure_is_evaluated_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = _lars([parameter], "simclr", lr=1.0, weight_decay=0.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 25.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([[3.0, 4.0]]) * (1 - ETA))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_never_asks_the_device_for_a_value(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there is nothing to read: .item() or a branch on a tensor raises."""
    parameters = [nn.Parameter(torch.empty_like(t, device="meta")) for t in _tensors(torch.float32)]
    optimizer = _lars(parameters, variant)
    optimizer.found_inf = torch.empty((), device="meta")
    for p in parameters:
        p.grad = torch.empty_like(p)
    launched: list[int] = []  # the fused kernel has no meta implementation
    monkeypatch.setattr(torch, "_fused_sgd_", lambda params, *_, **__: launched.append(len(params)))
    optimizer.step()
    assert sum(launched) == len(parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"weight_decay": math.nan}, "weight_decay must not be negative"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"momentum": 0.0, "nesterov": True}, "needs a momentum"),
        ({"variant": "vissl"}, "use one of simclr, mocov3, you"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(2, 2))], **({"lr": 0.1} | options))


def test_parameters_that_cannot_be_updated_in_place_are_refused() -> None:
    with pytest.raises(ValueError, match="strided view"):
        LARS([nn.Parameter(torch.ones(4, 4)[:, ::2])], lr=0.1)
    with pytest.raises(ValueError, match="not floating point"):
        LARS([nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)], lr=0.1)
