"""The Triton LARS and EMA against float64 and foreach; run by ``test_lars_triton.py``."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from kernels import dispatch
from kernels import multi_tensor as multi
from kernels.ema import ema_update_
from kernels.lars import Settings, Variant, lars_update_
from kernels.lars import triton_kernels as kernels
from tests.kernels.lars_reference import lars_reference_
from trainer.optim.lars import LARS
from trainer.optim.optimizers import apply_update, gradient_norm

VARIANTS: tuple[Variant, ...] = ("simclr", "mocov3", "you")
# Odd sizes, a scalar, nothing, exactly a block.
SHAPES: list[tuple[int, ...]] = [
    (4, 3, 3, 3),
    (5, 205),  # a block and one
    (3, 3),
    (6,),
    (),
    (1024,),
    (0, 4),
]
CHUNK_AND_A_BIT = (1, multi.CHUNK + 7)

variants = pytest.mark.parametrize("variant", VARIANTS)


def tensors(seed: int, channels_last: bool = False, large: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [*SHAPES, CHUNK_AND_A_BIT] if large else SHAPES
    made = [10.0 ** (i % 3 - 1) * torch.randn(s, generator=generator) for i, s in enumerate(shapes)]
    made[2].zero_()
    if channels_last:
        made = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in made]
    return made


def optimizer(parameters: list[nn.Parameter], implementation: Any, **options: Any) -> LARS:
    settings = {"lr": 0.5, "weight_decay": 1e-2, "implementation": implementation}
    return LARS(parameters, **(settings | options))


def train(
    implementation: str, steps: range, channels_last: bool = False, **options: Any
) -> tuple[list[nn.Parameter], LARS]:
    parameters = [nn.Parameter(t) for t in tensors(0, channels_last)]
    lars = optimizer(parameters, implementation, **options)
    for step in steps:
        for parameter, gradient in zip(parameters, tensors(100 + step)):
            parameter.grad = gradient
        apply_update(lars, 0.1 * (step + 1))
    return parameters, lars


def assert_same(got: list[Any], want: list[Any]) -> None:
    """To the bit."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def assert_close(got: list[Any], want: list[Any]) -> None:
    """To two units in the last place of a tensor's largest value, which was 0.1 at the least."""
    for a, b in zip(got, want, strict=True):
        if b.numel():
            assert (a - b).abs().max() <= 2.0**-22 * b.abs().max().clamp(min=0.1)


def momenta(parameters: list[nn.Parameter], lars: LARS) -> list[torch.Tensor]:
    return [lars.state[p]["momentum_buffer"] for p in parameters]


@variants
@pytest.mark.parametrize(("nesterov", "momentum"), [(False, 0.9), (True, 0.9), (False, 0.0)])
def test_equals_foreach(variant: Variant, nesterov: bool, momentum: float) -> None:
    options = {"variant": variant, "nesterov": nesterov, "momentum": momentum}
    ours, our_state = train("triton", range(2), channels_last=nesterov, **options)
    theirs, their_state = train("foreach", range(2), channels_last=nesterov, **options)
    assert_close(ours, theirs)
    if momentum:
        assert_close(momenta(ours, our_state), momenta(theirs, their_state))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_at_most_twice_as_far_from_float64_as_plain_torch(
    variant: Variant, dtype: torch.dtype
) -> None:
    settings = Settings(
        lr=0.7,
        momentum=0.9,
        weight_decay=1e-2,
        trust_coefficient=0.3,  # large, so that an error in the ratio shows
        variant=variant,
        nesterov=variant == "mocov3",
    )
    grads = [g.to(dtype) for g in tensors(1, large=True)]
    ends = []
    for real, update in (
        (torch.float64, lars_reference_),
        (torch.float32, lars_reference_),
        (torch.float32, lars_update_),
    ):
        lists = [[t.to(real) for t in tensors(seed, large=True)] for seed in (0, 2)]
        update(lists[0], grads, lists[1], settings, adapt=True)
        ends.append(lists[0] + lists[1])
    for exact, plain, ours in zip(*ends):
        if exact.numel() > 1:  # the last digit of one number is chance
            far = (plain - exact).abs().max()
            assert (ours - exact).abs().max() <= 2 * far + 1e-7 * exact.abs().max()


@variants
@pytest.mark.parametrize("before", [0, 1])
def test_skipped_step_changes_no_bit(variant: Variant, before: int) -> None:
    parameters, lars = train("triton", range(before), variant=variant)
    weights = [p.detach().clone() for p in parameters]
    velocities = copy.deepcopy(momenta(parameters, lars)) if before else None
    for parameter, gradient in zip(parameters, tensors(7)):
        parameter.grad = gradient
    parameters[0].grad[0, 0, 0, 0] = math.nan  # type: ignore[index]
    assert apply_update(lars, 1.0, gradient_norm(lars)).item() == 1
    assert_same(parameters, weights)
    for after, velocity in zip(momenta(parameters, lars), velocities or [0] * len(parameters)):
        assert torch.equal(after, torch.zeros_like(after) if velocities is None else velocity)


def test_finite_step_under_guard_is_the_plain_step() -> None:
    ends = []
    for guarded in (False, True):
        parameters, lars = train("triton", range(1))
        apply_update(lars, 0.3, gradient_norm(lars) if guarded else None)
        ends.append(parameters)
    assert_same(ends[0], ends[1])


@variants
def test_zero_weights_leave_zero_and_zero_gradients_stay_finite(variant: Variant) -> None:
    weight, still, both = (nn.Parameter(torch.full((2, 2), x)) for x in (0.0, 1.0, 0.0))
    weight.grad, still.grad, both.grad = torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer([weight, still, both], "triton", variant=variant, weight_decay=0.0).step()
    assert torch.equal(weight, torch.full((2, 2), -0.5))  # ratio 1, not 0
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(both, torch.zeros(2, 2))


def test_gradients_may_lie_anywhere_and_move_between_steps() -> None:
    def run(implementation: str, slack: int) -> list[nn.Parameter]:
        parameters = [nn.Parameter(t) for t in tensors(0)]
        lars = optimizer(parameters, implementation)
        for step in range(2):
            # Slices of one bucket, as DDP may give them, a float off the widest load's alignment.
            flat = [g.flatten() for g in tensors(50 + step)]
            bucket = torch.cat([torch.zeros(slack * (step + 1)), *flat])
            views = bucket[slack * (step + 1) :].split([len(f) for f in flat])
            for parameter, view in zip(parameters, views):
                parameter.grad = view.view_as(parameter)
            lars.step()
        return parameters

    assert_close(run("triton", 1), run("foreach", 0))


def test_gradients_in_another_layout_are_matched() -> None:
    ours, theirs = (train(name, range(2), channels_last=True)[0] for name in ("triton", "foreach"))
    assert_close(ours, theirs)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_two_runs_are_equal_to_the_bit_and_leave_gradients_alone() -> None:
    (one, _), (other, _) = train("triton", range(2)), train("triton", range(2))
    assert_same(one, other)
    assert_same([p.grad for p in one], tensors(101))


def test_a_run_goes_on_with_the_other_implementation() -> None:
    ends = []
    for second in ("triton", "foreach"):
        parameters, lars = train("triton", range(1))
        resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
        again = optimizer(resumed, second)
        again.load_state_dict(copy.deepcopy(lars.state_dict()))
        for parameter, gradient in zip(resumed, tensors(60)):
            parameter.grad = gradient
        again.step()
        ends.append(resumed)
    assert_close(ends[0], ends[1])


@variants
def test_weights_without_gradient_end_where_those_of_foreach_do(variant: Variant) -> None:
    ends = []
    for implementation in ("triton", "foreach"):
        parameters = [nn.Parameter(t) for t in tensors(0)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer(parameters, implementation, variant=variant).step()
        ends.append(parameters)
    assert_close(*ends)
    decayed = not torch.equal(ends[0][0], tensors(0)[0])
    assert decayed == (variant != "you")


def test_ratios_of_tensors_of_many_chunks_and_of_none() -> None:
    sizes = (multi.CHUNK * 2500, 0, 5, multi.CHUNK + 1)
    cut = multi.chunks(sizes, torch.device("cpu"))
    assert cut.first.tolist() == [0, 2500, 2500, 2501, 2503]
    assert cut.plan[:, -1].tolist() == [3, 1, 1]
    partial = torch.rand(2, cut.count) + 0.5
    ratios = torch.empty(len(sizes))
    kernels.ratios_kernel[(len(sizes),)](
        partial, cut.first, ratios, cut.count, 0.1, 0.5, 1e-3, PAPER=True, BLOCK=1024
    )
    for number, (begin, end) in enumerate(zip(cut.first[:-1], cut.first[1:])):
        w, g = partial[:, begin:end].double().sum(1).sqrt()
        want = 0.5 * w / (g + 0.1 * w + 1e-3) if begin < end else torch.zeros(())
        torch.testing.assert_close(ratios[number].double(), want.double(), rtol=3e-7, atol=0)


@pytest.mark.slow
@variants
@pytest.mark.parametrize("nesterov", [False, True])
def test_twelve_steps_drift_no_further_than_those_of_foreach(
    variant: Variant, nesterov: bool
) -> None:
    ends = []
    for implementation, real in (
        ("foreach", torch.float64),
        ("foreach", torch.float32),
        ("triton", torch.float32),
    ):
        parameters = [nn.Parameter(t.to(real)) for t in tensors(0, True, large=True)]
        lars = optimizer(parameters, implementation, variant=variant, nesterov=nesterov)
        for step in range(12):
            for parameter, gradient in zip(parameters, tensors(100 + step, large=True)):
                parameter.grad = gradient.to(real)
            apply_update(lars, 0.1 * min(step, 12 - step))
        ends.append([p.detach() for p in parameters])
    for exact, plain, ours in zip(*ends):
        if exact.numel():
            far = (plain - exact).abs().max()
            assert (ours - exact).abs().max() <= 2 * far + 2e-7 * exact.abs().max()


def test_wrong_tensors_are_refused() -> None:
    settings = Settings(
        lr=1.0, momentum=0.0, weight_decay=0.0, trust_coefficient=1.0, variant="simclr"
    )
    weight = torch.ones(2, 3, 4, 5)
    last = weight.to(memory_format=torch.channels_last)
    for wrong in (last, weight[0], weight[:, :, :, ::2]):
        with pytest.raises(ValueError, match="do not lie alike"):
            lars_update_([weight], [wrong], None, settings, adapt=True)
    with pytest.raises(ValueError, match="float64, not float32"):
        lars_update_([weight.double()], [weight], None, settings, adapt=True)
    with pytest.raises(ValueError, match="lists of 1 and 2"):
        lars_update_([weight], [weight, weight], None, settings, adapt=True)
    with pytest.raises(ValueError, match="momenta are float64"):
        lars_update_([weight], [weight], [weight.double()], settings, adapt=True)
    parameter = nn.Parameter(weight.double())
    parameter.grad = weight.double()
    with pytest.raises(ValueError, match="'triton' cannot run: parameters are float64"):
        optimizer([parameter], "triton").step()
    lars_update_([], [], None, settings, adapt=True)


def test_the_choice_is_recorded() -> None:
    dispatch.forget()
    train("triton", range(1))
    ema_update_([torch.ones(3)], [torch.ones(3)], 0.5, "triton")
    assert "lars: triton: as asked" in dispatch.explain()
    assert "ema: triton: as asked" in dispatch.explain()
    dispatch.forget()


# --- the key encoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_moving_average_is_as_accurate_as_foreach(momentum: float, channels_last: bool) -> None:
    keys, queries = tensors(3, channels_last), tensors(4, channels_last)
    exact = [k.double() * momentum + q.double() * (1 - momentum) for k, q in zip(keys, queries)]
    plain = [k.clone() for k in keys]
    ema_update_(plain, queries, momentum, "foreach")
    before = [q.clone() for q in queries]
    ema_update_(keys, queries, momentum, "triton")
    for ours, theirs, want in zip(keys, plain, exact):
        if want.numel():
            far = (theirs - want).abs().max()
            assert (ours - want).abs().max() <= 2 * far + 1e-7 * want.abs().max()
    assert_same(queries, before)
    if momentum == 1.0:
        assert_same(keys, tensors(3, channels_last))


def test_moving_average_of_bfloat16_queries_and_unaligned_keys() -> None:
    flat = torch.randn(3001)
    keys, queries = [flat[1:]], [torch.randn(3000).bfloat16()]
    want = keys[0] * 0.9 + queries[0].float() * 0.1
    ema_update_(keys, queries, 0.9, "triton")
    torch.testing.assert_close(keys[0], want)


def test_moving_average_of_tensors_that_lie_differently_is_refused() -> None:
    key = torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match="lie differently"):
        ema_update_([key], [key.to(memory_format=torch.channels_last)], 0.9, "triton")
