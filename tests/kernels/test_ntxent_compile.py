"""The losses under ``torch.compile``, whole; and the custom operations against torch's own checks.

``aot_eager`` traces and differentiates as every backend does, and generates no code: what could
break here is the tracing.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import library

from kernels.ntxent import Implementation, info_nce, nt_xent, ops
from tests.dist import run_ranks


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _projections(batch: int = 6, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(2, batch, dim, generator=generator, dtype=torch.float64).to(dtype)


def _value_and_gradient(function: Any, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = leaves[0].clone().requires_grad_()
    loss = function(leaf, *leaves[1:])
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _nt_xent_of_a_model(z_VBD: torch.Tensor) -> torch.Tensor:
    return nt_xent(torch.tanh(z_VBD) * 2, 0.1)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nt_xent_compiles_whole(dtype: torch.dtype) -> None:
    z = _projections(dtype=dtype)
    compiled = torch.compile(_nt_xent_of_a_model, backend="aot_eager", fullgraph=True)
    value, gradient = _value_and_gradient(compiled, z)
    expected, expected_gradient = _value_and_gradient(_nt_xent_of_a_model, z)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert torch.allclose(value, expected, rtol=tolerance)
    assert torch.allclose(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_nt_xent_compiles_for_any_batch() -> None:
    compiled = torch.compile(_nt_xent_of_a_model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (5, 6, 9):
        z = _projections(batch)
        value, gradient = _value_and_gradient(compiled, z)
        expected, expected_gradient = _value_and_gradient(_nt_xent_of_a_model, z)
        assert torch.allclose(value, expected, rtol=1e-12)
        assert torch.allclose(gradient, expected_gradient, atol=1e-12)


@pytest.mark.parametrize("kind", ["keys", "queue"])
def test_info_nce_compiles_whole(kind: str) -> None:
    queries, keys = _projections()
    more: dict[str, torch.Tensor] = {}
    if kind == "queue":
        more["queue_QD"] = torch.nn.functional.normalize(_projections(9)[0], dim=1)

    def loss(queries_MD: torch.Tensor, keys_MD: torch.Tensor) -> torch.Tensor:
        value, accuracy = info_nce(queries_MD, keys_MD, 0.2, **more)
        return value + 0 * accuracy

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, gradient = _value_and_gradient(compiled, queries, keys)
    expected, expected_gradient = _value_and_gradient(loss, queries, keys)
    assert torch.allclose(value, expected, rtol=1e-12)
    assert torch.allclose(gradient, expected_gradient, atol=1e-12)


def _compiled_on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    z = _projections(8)[:, rank * 4 : rank * 4 + 4]
    compiled = torch.compile(_nt_xent_of_a_model, backend="aot_eager", fullgraph=True)
    value, gradient = _value_and_gradient(compiled, z)
    return {"loss": value, "gradient": gradient}


def test_nt_xent_compiles_whole_on_two_ranks() -> None:
    results = run_ranks(_compiled_on_a_rank, 2, timeout=120)
    value, gradient = _value_and_gradient(_nt_xent_of_a_model, _projections(8))
    assert all((r["loss"] - value).abs() < 1e-12 for r in results)
    both = torch.cat([r["gradient"] for r in results], dim=1)
    assert torch.allclose(both, 2 * gradient, atol=1e-12)


def _unit(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator).to(dtype), dim=1)


# Schema, fake kernel, autograd registration; not "test_aot_dispatch_dynamic" with random inputs
# whose gradients it would compare twice.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


SETTINGS = ops.Settings(5.0, None, "auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["nt_xent", "info_nce", "queue"])
def test_operations_keep_torchs_rules(kind: str, dtype: torch.dtype) -> None:
    unit, positive = _unit(8), torch.arange(8).roll(4)
    key = None if kind == "nt_xent" else _unit(8, dtype, seed=1)
    queue = _unit(7, dtype, seed=2) if kind == "queue" else None
    if queue is not None:
        positive = 7 + torch.arange(8)
    rest = (key, queue, positive, dtype, *SETTINGS)
    library.opcheck(ops.loss, (unit.clone().requires_grad_(), *rest), test_utils=CHECKS)
    _, _, columns, lse = ops.loss(unit, *rest)
    rows = None if key is None else unit
    library.opcheck(
        ops.gradient,
        (columns, lse, rows, positive, dtype, queue is not None, *SETTINGS),
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_gradients_are_derivatives(implementation: Implementation) -> None:
    z = _projections(3, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: nt_xent(x, 0.3, implementation=implementation)[0], z)
    queries, keys = _projections(4, 5)
    queue = _unit(6)[:, :5]
    for queue_QD in (None, queue):
        torch.autograd.gradcheck(
            lambda x, columns=queue_QD: info_nce(
                x, keys, 0.3, queue_QD=columns, implementation=implementation
            )[0],
            queries.clone().requires_grad_(),
        )


def test_a_second_derivative_is_refused_not_wrong() -> None:
    z = _projections().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(nt_xent(z)[0], z, create_graph=True)


def test_no_gradient_is_asked_for_and_none_is_made() -> None:
    loss, _ = nt_xent(_projections())
    assert not loss.requires_grad
    assert math.isfinite(loss.item())
