"""NT-Xent on one process: the equation, its derivative, its numbers at the edges, its memory."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ntxent import Implementation, nt_xent, ops

IMPLEMENTATIONS: list[Implementation] = ["reference", "blocked"]


def _projections(batch: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    z = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    # Views of a sample resemble each other, lengths do not: as projections in training.
    z[1] = 0.7 * z[0] + 0.5 * z[1]
    z *= torch.linspace(0.2, 3.0, 2 * batch, dtype=torch.float64).view(2, batch, 1)
    return z.to(dtype)


def _value_and_gradient(z: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[float, torch.Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss, _ = nt_xent(leaf, *args, **kwargs)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def _relative(error: torch.Tensor, of: torch.Tensor) -> float:
    return float(error.double().norm() / of.double().norm())


def _by_the_equation(z_VBD: torch.Tensor, temperature: float) -> float:
    """SimCLR eq. 1 and algorithm 1 with loops and plain floats: no shared code, no masks."""
    rows = [(row / row.norm()).tolist() for row in z_VBD.double().flatten(0, 1)]
    count, batch = len(rows), len(rows) // 2

    def similarity(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(rows[i], rows[j])) / temperature

    total = 0.0
    for i in range(count):
        positive = i + batch if i < batch else i - batch
        others = [math.exp(similarity(i, k)) for k in range(count) if k != i]
        total += -math.log(math.exp(similarity(i, positive)) / math.fsum(others))
    return total / count


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.1), (2, 0.5), (5, 0.1), (8, 1.0)])
def test_value_is_that_of_the_equation(
    implementation: Implementation, batch: int, temperature: float
) -> None:
    z = _projections(batch)
    loss, _ = nt_xent(z, temperature, implementation=implementation)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(_by_the_equation(z, temperature), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("block_size", [1, 3, 8, None])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accuracy_counts_the_anchors_whose_positive_is_nearest(
    implementation: Implementation, block_size: int | None, temperature: float
) -> None:
    z = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[1] += z[0]
    unit = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    similar = (unit @ unit.T).fill_diagonal_(-2)
    nearest = [int(row.argmax()) == (i + 9) % 18 for i, row in enumerate(similar)]
    options: dict[str, Any] = {"implementation": implementation, "block_size": block_size}
    _, accuracy = nt_xent(z, temperature, **options)
    assert 0 < sum(nearest) < 18
    assert accuracy.item() == pytest.approx(sum(nearest) / 18)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_rows_are_not_accurate(implementation: Implementation) -> None:
    z = torch.ones(2, 6, 4, requires_grad=True)
    loss, accuracy = nt_xent(z, 0.1, implementation=implementation)
    loss.backward()
    assert accuracy.item() == 0
    assert not accuracy.requires_grad


@pytest.mark.parametrize("block_size", [1, 3, 8, None])
def test_blocked_gradient_is_the_derivative(block_size: int | None) -> None:
    z = _projections(4).requires_grad_()
    torch.autograd.gradcheck(lambda x: nt_xent(x, 0.2, block_size=block_size)[0], z)


def test_reference_gradient_is_the_derivative() -> None:
    z = _projections(4).requires_grad_()
    torch.autograd.gradcheck(lambda x: nt_xent(x, 0.2, implementation="reference")[0], z)


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("block_size", [1, 2, 5, 14, 1000])
def test_tiles_of_any_size_give_the_reference(batch: int, block_size: int) -> None:
    z = _projections(batch)
    value, gradient = _value_and_gradient(z, implementation="reference")
    tiled, tiled_gradient = _value_and_gradient(z, block_size=block_size)
    assert tiled == pytest.approx(value, abs=1e-12)
    assert torch.allclose(tiled_gradient, gradient, atol=1e-12, rtol=0)


@pytest.mark.processors
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1, 1.0])
@pytest.mark.parametrize("block_size", [8, None])
def test_float32_is_right_at_every_temperature(temperature: float, block_size: int | None) -> None:
    z = _projections(32, dim=3)  # few dimensions: similarities from -1 to 1, logits to +-100
    value, gradient = _value_and_gradient(z, temperature, implementation="reference")
    single, single_gradient = _value_and_gradient(z.float(), temperature, block_size=block_size)
    assert single == pytest.approx(value, rel=1e-5)
    assert _relative(single_gradient - gradient, of=gradient) < 1e-4


@pytest.mark.processors
@pytest.mark.parametrize("temperature", [0.01, 0.05])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_at_low_temperature(
    dtype: torch.dtype, temperature: float
) -> None:
    # exp(1 / 0.05) overflows float16, and so do the squares of these projections.
    z = _projections(64, dim=128).mul(300).to(dtype)
    value, gradient = _value_and_gradient(z, temperature)
    assert math.isfinite(value)
    assert bool(gradient.isfinite().all())
    exact, _ = _value_and_gradient(z.double(), temperature, implementation="reference")
    assert value == pytest.approx(exact, abs=1e-3)


@pytest.mark.processors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradient_is_within_a_percent(dtype: torch.dtype) -> None:
    z = _projections(256, dim=128).to(dtype)
    _, exact = _value_and_gradient(z.double(), implementation="reference")
    _, gradient = _value_and_gradient(z)
    _, same_dtype = _value_and_gradient(z, implementation="reference")
    error = _relative(gradient - exact, of=exact)
    assert gradient.dtype == dtype
    assert error < 0.01
    assert error <= 2 * _relative(same_dtype - exact, of=exact)


@pytest.mark.processors
def test_opposite_neighbours_lose_no_row_to_underflow() -> None:
    # Beside an identical pair (logits +100) stands a row whose logits are all near -100: a maximum
    # shared by a whole tile would turn its sum into log 0.
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 1e-3]]])
    value, gradient = _value_and_gradient(z, 0.01)
    exact, _ = _value_and_gradient(z.double(), 0.01, implementation="reference")
    assert value == pytest.approx(exact, rel=1e-5)
    assert bool(gradient.isfinite().all())


@pytest.mark.processors
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_collapsed_projections_cost_the_log_of_the_other_rows(
    implementation: Implementation,
) -> None:
    z = torch.ones(2, 8, 4)
    value, gradient = _value_and_gradient(z, implementation=implementation)
    assert value == pytest.approx(math.log(15), rel=1e-6)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_zero_row_leaves_value_and_gradient_finite(implementation: Implementation) -> None:
    z = _projections(4, dtype=torch.float32)
    z[0, 1] = 0
    value, gradient = _value_and_gradient(z, implementation=implementation)
    assert math.isfinite(value)
    assert bool(gradient.isfinite().all())


@pytest.mark.processors
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_is_passed_on_not_hidden(
    implementation: Implementation, dtype: torch.dtype, temperature: float
) -> None:
    """Finite rows too whose squares overflow: the whole batch of a run that explodes."""
    too_large = 1e160 if dtype == torch.float64 else 1e19
    for rows, factor in ((1, math.nan), (1, math.inf), (1, too_large), (4, too_large)):
        z = _projections(4, dtype=torch.float64)
        z[:, :rows] *= factor
        leaf = z.to(dtype).requires_grad_()
        loss, accuracy = nt_xent(leaf, temperature, implementation=implementation)
        loss.backward()
        assert leaf.grad is not None
        assert math.isnan(loss.item())
        assert bool(leaf.grad.isnan().all())
        assert accuracy.item() == 0
    # As large as squares may be.
    value, gradient = _value_and_gradient(_projections(4, dtype=torch.float32) * 1e18)
    assert math.isfinite(value) and bool(gradient.isfinite().all())


def test_length_of_projections_does_not_matter_and_gradient_is_tangent() -> None:
    z = _projections(6)
    value, gradient = _value_and_gradient(z)
    assert nt_xent(3 * z)[0].item() == pytest.approx(value, abs=1e-12)
    assert (gradient * z).sum(-1).abs().max() < 1e-12


def test_samples_and_views_may_change_places() -> None:
    z = _projections(6)
    value, gradient = _value_and_gradient(z)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    moved, moved_gradient = _value_and_gradient(z.flip(0)[:, order])
    assert moved == pytest.approx(value, abs=1e-12)
    assert torch.allclose(moved_gradient, gradient.flip(0)[:, order], atol=1e-12)


def test_upstream_gradient_scales_the_gradient() -> None:
    z = _projections(5)
    _, gradient = _value_and_gradient(z)
    leaf = z.clone().requires_grad_()
    (-2.5 * nt_xent(leaf)[0]).backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, -2.5 * gradient, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_changes_nothing(implementation: Implementation) -> None:
    z = _projections(32, dim=16, dtype=torch.float32)
    value, gradient = _value_and_gradient(z, 0.05, implementation=implementation)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = nt_xent(leaf, 0.05, implementation=implementation)
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == value
    assert leaf.grad is not None
    # The reference's backward runs under the autocast around it; ours shields itself.
    assert implementation == "reference" or torch.equal(leaf.grad, gradient)


def test_strided_projections_give_the_same() -> None:
    z = _projections(6)
    value, gradient = _value_and_gradient(z)
    leaf = z.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loss, _ = nt_xent(leaf)
    (strided,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == value
    assert torch.equal(strided, gradient)


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((4, 8), {}, r"\(2, B, D\)"),
        ((3, 4, 8), {}, r"\(2, B, D\)"),
        ((2, 0, 8), {}, "no samples"),
        ((2, 4, 8), {"temperature": 0.0}, "temperature"),
        ((2, 4, 8), {"temperature": math.nan}, "temperature"),
        ((2, 4, 8), {"temperature": math.inf}, "temperature"),
        ((2, 4, 8), {"temperature": torch.tensor(0.1)}, "no derivative by the temperature"),
        ((2, 4, 8), {"implementation": "fast"}, "implementation"),
        ((2, 4, 8), {"block_size": 0}, "block_size"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    shape: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(shape), **kwargs)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        nt_xent(torch.ones(2, 4, 8, dtype=torch.int64))


class _Memory(TorchDispatchMode):
    """Bytes of all storages that operations inside have made: the most at a time, the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside a custom operation of ours the mode is off: run the function that it runs instead.
        plain = {"contrastive_loss": ops.loss_rows, "contrastive_gradient": ops.gradient_rows}
        if func.namespace == "widebatch":
            with self:
                return plain[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _peak_memory(batch: int, **kwargs: Any) -> _Memory:
    z = torch.randn(2, batch, 8, requires_grad=True)
    with _Memory() as memory:
        nt_xent(z, **kwargs)[0].backward()
    return memory


def test_memory_is_that_of_the_rows_and_a_few_tiles() -> None:
    block, batch = 64, 1024
    rows = 2 * batch * 8 * 4
    tile = block * block * 4
    memory = _peak_memory(batch, block_size=block)
    assert memory.largest <= max(rows, tile)
    assert memory.peak <= 12 * rows + 5 * tile
    # The measure itself sees the complete matrix where there is one.
    assert _peak_memory(batch, implementation="reference").largest >= (2 * batch) ** 2 * 4
