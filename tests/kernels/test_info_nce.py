"""InfoNCE, with gathered keys (MoCo v3) and with a queue (v1, v2), on one process and several."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from kernels.ntxent import Implementation, info_nce
from tests.dist import run_ranks

IMPLEMENTATIONS: list[Implementation] = ["reference", "blocked"]
TEMPERATURE = 0.2


def _batch(rows: int = 12, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    queries, noise, queue = torch.randn(3, rows, dim, generator=generator, dtype=torch.float64)
    return queries, 0.8 * queries + 0.9 * noise, normalize(queue, dim=1)


def _run(queries: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    leaf = queries.clone().requires_grad_()
    loss, accuracy = info_nce(leaf, *args, **kwargs)
    loss.backward()
    assert leaf.grad is not None
    return {"loss": loss.detach(), "gradient": leaf.grad, "accuracy": accuracy}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 5, None])
def test_gathered_keys_are_a_classification(
    implementation: Implementation, block_size: int | None
) -> None:
    queries, keys, _ = _batch()
    leaf = queries.clone().requires_grad_()
    logits = normalize(leaf, dim=1) @ normalize(keys, dim=1).T / TEMPERATURE
    expected = cross_entropy(logits, torch.arange(12))
    expected.backward()
    result = _run(queries, keys, TEMPERATURE, implementation=implementation, block_size=block_size)
    assert result["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert leaf.grad is not None
    assert torch.allclose(result["gradient"], leaf.grad, atol=1e-12)
    hits = (logits.argmax(1) == torch.arange(12)).double().mean()
    assert result["accuracy"].item() == pytest.approx(hits.item())
    assert 0 < hits < 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_a_queue_other_keys_of_the_batch_are_no_negatives(
    implementation: Implementation,
) -> None:
    queries, keys, queue = _batch()
    leaf = queries.clone().requires_grad_()
    unit, key = normalize(leaf, dim=1), normalize(keys, dim=1)
    logits = torch.cat([(unit * key).sum(1, keepdim=True), unit @ queue.T], 1) / TEMPERATURE
    expected = cross_entropy(logits, torch.zeros(12, dtype=torch.int64))  # MoCo algorithm 1
    expected.backward()
    result = _run(queries, keys, TEMPERATURE, queue_QD=queue, implementation=implementation)
    assert result["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert leaf.grad is not None
    assert torch.allclose(result["gradient"], leaf.grad, atol=1e-12)
    assert result["accuracy"].item() == pytest.approx((logits.argmax(1) == 0).double().mean())


def test_keys_and_queue_take_no_gradient() -> None:
    queries, keys, queue = (rows.requires_grad_() for rows in _batch())
    for implementation in IMPLEMENTATIONS:
        loss, _ = info_nce(queries, keys, 0.1, queue_QD=queue, implementation=implementation)
        loss.backward()
    assert keys.grad is None
    assert queue.grad is None


def test_the_queue_may_be_overwritten_before_backward() -> None:
    queries, keys, queue = _batch()
    expected = _run(queries, keys, TEMPERATURE, queue_QD=queue)["gradient"]
    leaf = queries.clone().requires_grad_()
    loss, _ = info_nce(leaf, keys, TEMPERATURE, queue_QD=queue)
    queue.zero_()
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


@pytest.mark.processors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_low_precision_and_temperature(dtype: torch.dtype, temperature: float) -> None:
    queries, keys, _ = (rows.to(dtype) for rows in _batch(64, 32))
    exact = _run(queries.double(), keys.double(), temperature, implementation="reference")
    result = _run(queries, keys, temperature)
    assert result["loss"].dtype == torch.float32
    assert result["gradient"].dtype == dtype
    assert math.isfinite(result["loss"].item())
    assert result["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.02, abs=0.02)


def test_collapse_has_no_nearest_key() -> None:
    ones = torch.ones(8, 4)
    result = _run(ones, ones, 0.1)
    assert result["loss"].item() == pytest.approx(math.log(8), rel=1e-6)
    assert result["accuracy"].item() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_rows_that_overflow_are_passed_on_not_hidden(
    side: str, with_queue: bool, implementation: Implementation
) -> None:
    queries, keys, queue = (rows.float() for rows in _batch())
    (queries if side == "queries" else keys).mul_(1e20)
    options: dict[str, Any] = {"queue_QD": queue} if with_queue else {}
    result = _run(queries, keys, TEMPERATURE, implementation=implementation, **options)
    assert math.isnan(result["loss"].item())
    assert bool(result["gradient"].isnan().all())
    assert result["accuracy"].item() == 0


def _on_a_rank(
    rank: int, world_size: int, rows: list[int], implementation: Implementation, with_queue: bool
) -> dict[str, torch.Tensor]:
    queries, keys, queue = _batch()
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    return _run(
        queries[own],
        keys[own],
        TEMPERATURE,
        queue_QD=queue if with_queue else None,
        implementation=implementation,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("rows", [[6, 6], [4, 4, 4]])
def test_any_number_of_ranks_is_one_process(
    rows: list[int], with_queue: bool, implementation: Implementation
) -> None:
    results = run_ranks(_on_a_rank, len(rows), rows, implementation, with_queue)
    queries, keys, queue = _batch()
    expected = _run(
        queries,
        keys,
        TEMPERATURE,
        queue_QD=queue if with_queue else None,
        implementation="reference",
    )
    for result in results:
        assert torch.equal(result["loss"], results[0]["loss"]), "to the last bit"
        assert (result["loss"] - expected["loss"]).abs() < 1e-12
        assert (result["accuracy"] - expected["accuracy"]).abs() < 1e-12
    gathered = torch.cat([result["gradient"] for result in results])
    assert torch.allclose(gathered, len(rows) * expected["gradient"], atol=1e-12)


@pytest.mark.parametrize(
    ("queries", "keys", "kwargs", "message"),
    [
        ((4, 8), (5, 8), {}, "one shape"),
        ((2, 4, 8), (2, 4, 8), {}, "one shape"),
        ((4, 8), (4, 8), {"temperature": 0.0}, "temperature"),
        ((4, 8), (4, 8), {"queue_QD": torch.ones(3, 9)}, "queue"),
        ((4, 8), (4, 8), {"temperature": torch.tensor(0.1)}, "no derivative by the temperature"),
        ((4, 8), (4, 8), {"block_size": -1}, "block_size"),
        ((0, 8), (0, 8), {}, "no queries"),
        ((0, 8), (0, 8), {"queue_QD": torch.ones(3, 8)}, "no queries"),
        ((4, 8), (4, 8), {"implementation": "fast"}, "implementation"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    queries: tuple[int, ...], keys: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(torch.ones(queries), torch.ones(keys), **{"temperature": 0.1, **kwargs})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_positives_may_be_rows_of_the_queue(implementation: Implementation) -> None:
    """A memory bank: the softmax over all of its rows, each once."""
    queries, _, queue = _batch()
    place = torch.arange(12).flip(0) % len(queue)
    leaf = queries.clone().requires_grad_()
    logits = normalize(leaf, dim=1) @ queue.T / TEMPERATURE
    expected = cross_entropy(logits, place)
    expected.backward()
    mine = queries.clone().requires_grad_()
    loss, accuracy = info_nce(
        mine,
        None,
        TEMPERATURE,
        positive_M=place,
        queue_QD=queue,
        implementation=implementation,
        block_size=None if implementation == "reference" else 16,
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(mine.grad, leaf.grad, atol=1e-12)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == place).double().mean())


def test_positives_outside_the_queue_are_refused() -> None:
    queries, keys, queue = _batch()
    place = torch.arange(12) % len(queue)
    for wrong in (place - 1, place + len(queue)):
        with pytest.raises(RuntimeError, match="must name rows of the queue"):
            info_nce(queries, None, 0.1, positive_M=wrong, queue_QD=queue)
    with pytest.raises(ValueError, match="int64"):
        info_nce(queries, None, 0.1, positive_M=place.int(), queue_QD=queue)
    for keys_MD, positive_M, queue_QD in (
        (None, None, queue),
        (None, place, None),
        (keys, place, queue),
    ):
        with pytest.raises(ValueError, match="keys, or a queue and each query's place"):
            info_nce(queries, keys_MD, 0.1, positive_M=positive_M, queue_QD=queue_QD)
