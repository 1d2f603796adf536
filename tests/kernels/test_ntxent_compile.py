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

from kernels.ntxent import (
    Implementation,
    info_nce,
    info_nce_and_accuracy,
    info_nce_ops,
    nt_xent,
    ops,
)
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
    return nt_xent(torch.tanh(z_VBD) * 2, 0.1)


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


@pytest.mark.parametrize("with_queue", [False, True])
def test_info_nce_compiles_whole(with_queue: bool) -> None:
    queries, keys = _projections()
    queue = torch.nn.functional.normalize(_projections(9)[0], dim=1) if with_queue else None

    def loss(queries_MD: torch.Tensor, keys_MD: torch.Tensor) -> torch.Tensor:
        value, accuracy = info_nce_and_accuracy(queries_MD, keys_MD, 0.2, queue_QD=queue)
        assert accuracy is not None
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


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32])
def test_operations_keep_torchs_rules(factor_dtype: torch.dtype) -> None:
    unit = _unit(8).requires_grad_()
    rest = (factor_dtype, 5.0, None, "", None, "auto", True)
    library.opcheck(ops.ntxent, (unit, *rest), test_utils=CHECKS)
    _, _, all_ND, lse_N = ops.ntxent(unit.detach(), *rest)
    library.opcheck(
        ops.ntxent_gradient, (all_ND, lse_N, 0, 8, 5.0, None, "auto"), test_utils=CHECKS
    )


@pytest.mark.parametrize("with_queue", [False, True])
def test_operations_of_info_nce_keep_torchs_rules(with_queue: bool) -> None:
    unit, key = _unit(5).requires_grad_(), _unit(5, seed=1)
    queue = _unit(7, seed=2) if with_queue else None
    rest = (key, queue, None, torch.float64, 5.0, None, "", None, "auto", True)
    library.opcheck(info_nce_ops.info_nce, (unit, *rest), test_utils=CHECKS)
    _, _, columns, lse, positive = info_nce_ops.info_nce(unit.detach(), *rest)
    library.opcheck(
        info_nce_ops.info_nce_gradient,
        (unit.detach(), columns, lse, positive, with_queue, 5.0, None, "auto"),
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_gradients_are_derivatives(implementation: Implementation) -> None:
    z = _projections(3, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: nt_xent(x, 0.3, implementation=implementation), z)
    queries, keys = _projections(4, 5)
    queue = _unit(6)[:, :5]
    for queue_QD in (None, queue):
        torch.autograd.gradcheck(
            lambda x, columns=queue_QD: info_nce(
                x, keys, 0.3, queue_QD=columns, implementation=implementation
            ),
            queries.clone().requires_grad_(),
        )


def test_a_second_derivative_is_refused_not_wrong() -> None:
    z = _projections().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(nt_xent(z), z, create_graph=True)


def test_no_gradient_is_asked_for_and_none_is_made() -> None:
    loss = nt_xent(_projections())
    assert not loss.requires_grad
    assert math.isfinite(loss.item())
