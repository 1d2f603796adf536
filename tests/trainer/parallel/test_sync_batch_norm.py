"""Synchronised batch norm: as if the global batch had gone through one process."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import ConfigError
from tests.dist import run_ranks
from trainer.parallel.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

CHANNELS = 5
Result = dict[str, torch.Tensor]

# Rows of each rank; empty and single-row shares included.
SHARES = {1: [13], 2: [9, 4], 3: [6, 0, 7], 4: [1, 8, 0, 4]}

INPUTS = {
    "rows": ((), torch.contiguous_format, nn.BatchNorm1d),
    "sequence": ((7,), torch.contiguous_format, nn.BatchNorm1d),
    "image": ((3, 4), torch.contiguous_format, nn.BatchNorm2d),
    "channels_last": ((3, 4), torch.channels_last, nn.BatchNorm2d),
    "volume": ((2, 3, 2), torch.channels_last_3d, nn.BatchNorm3d),
}
LAYERS: dict[str, dict[str, Any]] = {
    "affine": {},
    "plain": {"affine": False},
    "scale_only": {"bias": False},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
}


def _batches(kind: str, dtype: torch.dtype, mean: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two global batches, each an input and the gradient that flows into the layer's output."""
    tail, layout, _ = INPUTS[kind]
    torch.manual_seed(5)
    shape = (sum(SHARES[1]), CHANNELS, *tail)
    scale = torch.rand(1, CHANNELS, *[1] * len(tail), dtype=torch.float64) + 0.5
    batches = []
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64) * scale + mean
        dy = torch.randn(shape, dtype=torch.float64)
        batches.append(
            (x.to(dtype).contiguous(memory_format=layout), dy.to(dtype).contiguous())
        )  # the gradient's layout differs from the input's: it may, in a real model
    return batches


def _layer(kind: str, options: str, dtype: torch.dtype) -> nn.Module:
    layer: nn.Module = INPUTS[kind][2](CHANNELS, **LAYERS[options])
    torch.manual_seed(6)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.to(dtype)


def _pass(layer: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Result:
    """Train on every batch; the last one's outputs and gradients, and the running statistics."""
    result: Result = {}
    for x, dy in batches:
        layer.zero_grad()
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(x)
        y.backward(dy)
        assert y.dtype == x.dtype
        assert x.grad is not None
        result = {"y": y.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        result[f"d{name}"] = parameter.grad
    return result | dict(layer.named_buffers())


def _pass_of_rank(
    rank: int, world_size: int, kind: str, options: str, dtype: torch.dtype, mean: float
) -> Result:
    layer_dtype = torch.promote_types(dtype, torch.float32)
    layer = convert_sync_batch_norm(_layer(kind, options, layer_dtype))
    shares = SHARES[world_size]
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    mine = [(x[own], dy[own]) for x, dy in _batches(kind, dtype, mean)]
    result = _pass(layer, mine)
    for name in ("dweight", "dbias"):
        if name in result:
            dist.all_reduce(result[name])
    return result


def _passes_of_rank(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[Result]:
    return [_pass_of_rank(rank, world_size, *case) for case in cases]


def _whole(per_rank: list[Result]) -> Result:
    whole = dict(per_rank[0])
    for name in ("y", "dx"):
        whole[name] = torch.cat([result[name] for result in per_rank])
    for name in whole.keys() - {"y", "dx"}:
        for result in per_rank[1:]:
            assert torch.equal(result[name], whole[name]), f"{name} differs between ranks"
    return whole


def _assert_equal(got: Result, want: Result, atol: float, rtol: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name].double(),
            want[name].double(),
            atol=atol,
            rtol=rtol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_one_process_to_rounding_in_float64(world_size: int) -> None:
    cases: list[tuple[Any, ...]] = [(kind, "affine", torch.float64, 0.3) for kind in INPUTS]
    cases += [("channels_last", options, torch.float64, 0.3) for options in LAYERS]
    # A mean 1e5 standard deviations away: a sum of squares would lose 10 of 16 digits.
    cases += [("channels_last", "affine", torch.float64, 1e5)]
    per_rank = run_ranks(_passes_of_rank, world_size, cases)
    for number, (kind, options, dtype, mean) in enumerate(cases):
        want = _pass(_layer(kind, options, dtype), _batches(kind, dtype, mean))
        got = _whole([results[number] for results in per_rank])
        # The inputs themselves are rounded to 1e-16 of their mean.
        _assert_equal(got, want, atol=1e-12 if mean < 1 else 1e-8)


@pytest.mark.processors
def test_low_precision_inputs_are_as_good_as_native_ones() -> None:
    cases = [
        (kind, "affine", dtype, 0.3)
        for kind in ("rows", "channels_last")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    per_rank = run_ranks(_passes_of_rank, 2, cases)
    for number, (kind, options, dtype, mean) in enumerate(cases):
        got = _whole([results[number] for results in per_rank])
        exact = [(x.double(), dy.double()) for x, dy in _batches(kind, dtype, mean)]
        want = _pass(_layer(kind, options, torch.float64), exact)
        if dtype == torch.float32:
            _assert_equal(got, want, atol=3e-6, rtol=1e-6)
        else:  # sums and statistics are not rounded to bfloat16, elements are
            elements = {name: want.pop(name) for name in ("y", "dx")}
            _assert_equal({name: got.pop(name) for name in elements}, elements, 1e-2, 1e-2)
            _assert_equal(got, want, atol=3e-6, rtol=1e-6)


@pytest.mark.processors
def test_many_rows_are_summed_more_accurately_than_by_the_native_kernel() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 64, 64).to(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    want = _pass(nn.BatchNorm2d(8).double(), [(x.double(), dy.double())])
    native = _pass(nn.BatchNorm2d(8), [(x, dy)])
    ours = _pass(convert_sync_batch_norm(nn.BatchNorm2d(8)), [(x, dy)])
    for name in ("running_var", "dweight"):
        error, native_error = (
            (result[name].double() - want[name]).abs().max() for result in (ours, native)
        )
        assert error < native_error / 2, name


def _mean_loss_gradients(rank: int, world_size: int) -> Result:
    model = convert_sync_batch_norm(_small_network())
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    images = _images().chunk(world_size)[rank]
    parallel(images).pow(3).mean().backward()  # equal shares: the mean of means is the mean
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result | dict(model.named_buffers())


def _small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.BatchNorm2d(3),  # its input needs no gradient: no collective in its backward pass
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 16, 7, bias=False),
        nn.BatchNorm1d(7),
    ).double()


def _images() -> torch.Tensor:
    torch.manual_seed(4)
    images = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    return images.to(memory_format=torch.channels_last)


def test_gradients_after_averaging_are_those_of_the_global_mean_loss() -> None:
    network = _small_network()
    network(_images()).pow(3).mean().backward()
    want = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    want |= dict(network.named_buffers())
    for got in run_ranks(_mean_loss_gradients, 3):
        _assert_equal(got, want, atol=1e-12)


def _count_collectives(rank: int, world_size: int) -> list[list[str]]:
    calls: list[str] = []
    for name in ("all_gather_single", "all_reduce"):
        original = getattr(dist, name)

        def spy(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _call(*args, **kwargs)

        setattr(dist, name, spy)
    layer = convert_sync_batch_norm(nn.BatchNorm1d(3))
    y = layer(torch.randn(4, 3, requires_grad=True))
    forward = list(calls)
    calls.clear()
    y.sum().backward()
    backward = list(calls)
    calls.clear()
    layer.eval()
    layer(torch.randn(4, 3)).sum()
    return [forward, backward, calls]


def test_one_collective_forward_one_backward_none_in_evaluation() -> None:
    for forward, backward, evaluation in run_ranks(_count_collectives, 2):
        assert (forward, backward, evaluation) == (["all_gather_single"], ["all_reduce"], [])


def test_evaluation_is_plain_batch_norm() -> None:
    plain = _layer("channels_last", "affine", torch.float32)
    _pass(plain, _batches("channels_last", torch.float32, 0.3))
    x = _batches("channels_last", torch.float32, 0.3)[0][0]
    converted = convert_sync_batch_norm(copy.deepcopy(plain)).eval()
    assert torch.equal(converted(x), plain.eval()(x))


def _normalise_in_groups(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    return [_normalise_in_group(rank, group_size) for group_size in (0, 1, 2, 4)]


def _normalise_in_group(rank: int, group_size: int) -> tuple[Any, ...]:
    layer = convert_sync_batch_norm(nn.BatchNorm1d(2, affine=False).double(), group_size)
    copied = copy.deepcopy(layer)  # a key encoder
    x = torch.arange(4.0, dtype=torch.float64).view(2, 2) * (1 + rank) ** 2
    return layer(x), copied(x), layer.running_mean


def test_group_size_bounds_who_shares_statistics() -> None:
    x = [torch.arange(4.0, dtype=torch.float64).view(2, 2) * (1 + r) ** 2 for r in range(4)]
    per_rank = run_ranks(_normalise_in_groups, 4)
    for number, group_size in enumerate((0, 1, 2, 4)):
        for rank, (y, of_copy, running_mean) in enumerate(r[number] for r in per_rank):
            size = group_size or 4
            first = rank // size * size
            plain = nn.BatchNorm1d(2, affine=False).double()
            want = plain(torch.cat(x[first : first + size])).split(2)[rank - first]
            torch.testing.assert_close(y, want, atol=1e-13, rtol=0)
            torch.testing.assert_close(running_mean, plain.running_mean, atol=1e-13, rtol=0)
            assert torch.equal(y, of_copy)


def _bad_group_size(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        convert_sync_batch_norm(nn.BatchNorm1d(2), group_size=2)
    return str(caught.value)


def test_group_size_that_does_not_divide_the_processes_is_refused() -> None:
    for message in run_ranks(_bad_group_size, 3):
        assert "does not divide the 3 processes" in message
        assert "[1, 3]" in message
    with pytest.raises(ConfigError, match="does not divide the 1 processes"):
        convert_sync_batch_norm(nn.BatchNorm1d(2), group_size=2)


def _too_few(rank: int, world_size: int) -> str:
    layer = convert_sync_batch_norm(nn.BatchNorm1d(2))
    with pytest.raises(ValueError) as caught:
        layer(torch.ones(1 if rank == 0 else 0, 2))
    return str(caught.value)


def test_too_small_a_global_batch_fails_on_every_rank_alike() -> None:
    messages = run_ranks(_too_few, 2)
    assert len(set(messages)) == 1
    assert "more than one value per channel" in messages[0]


def test_wrong_channels_are_named() -> None:
    layer = convert_sync_batch_norm(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="3 channels got an input with 4"):
        layer(torch.randn(2, 4))


def test_conversion_keeps_parameters_names_and_keys() -> None:
    plain = torchvision.models.resnet18()
    keys = list(plain.state_dict())
    parameters = dict(plain.named_parameters())
    buffers = dict(plain.named_buffers())
    plain.layer1.eval()
    plain.bn1.weight.requires_grad_(False)
    converted = convert_sync_batch_norm(plain)
    assert converted is plain
    assert sum(isinstance(m, SyncBatchNorm) for m in converted.modules()) == 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert list(converted.state_dict()) == keys
    assert all(parameters[name] is p for name, p in converted.named_parameters())
    assert all(buffers[name] is b for name, b in converted.named_buffers())
    assert not converted.layer1[0].bn1.training
    assert converted.layer2[0].bn1.training
    torchvision.models.resnet18().load_state_dict(converted.state_dict())


def test_converting_twice_and_shared_layers() -> None:
    shared = nn.BatchNorm1d(3)
    network = convert_sync_batch_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert isinstance(network, nn.Sequential)
    assert network[0] is network[2]
    again = convert_sync_batch_norm(network)
    assert isinstance(again, nn.Sequential)
    assert again[0].weight is shared.weight


def test_a_batch_norm_with_behaviour_of_its_own_is_refused_by_name() -> None:
    class NormAndActivate(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input).relu()

    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), NormAndActivate(4)))
    with pytest.raises(ConfigError, match=r"0\.1 is a NormAndActivate"):
        convert_sync_batch_norm(network)


def test_double_backward_is_refused_not_wrong() -> None:
    layer = convert_sync_batch_norm(nn.BatchNorm1d(3))
    x = torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
