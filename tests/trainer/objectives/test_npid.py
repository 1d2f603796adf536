"""NPID's noise-contrastive estimate, and banks of fewer bits."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.trainer.runs import small_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Outputs
from trainer.objectives.npid import NPID, NPIDConfig
from trainer.objectives.parts.per_sample import PerSample

IMAGES, SAMPLES, NEGATIVES, DIM = 6, 40, 20, 16
TAKEN, LEFT_OUT = torch.tensor(0.0), torch.tensor(1.0)


def _objective(**settings: Any) -> NPID:
    torch.manual_seed(0)
    encoder: Any = small_encoder()
    encoder.feature_dim = 64
    settings = {"estimate": "nce", "negatives": NEGATIVES, "temperature": 0.2, **settings}
    head = HeadConfig(layers=1, out_dim=DIM, last_norm="none")
    return NPIDConfig(**settings).build(encoder, head, Given(seed=3, num_samples=SAMPLES)).double()


def _outputs(seed: int = 0, rank: int = 0, world_size: int = 1) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(IMAGES, DIM, generator=generator, dtype=torch.float64)
    ids = 3 * torch.arange(IMAGES)
    rows, ids = (each.chunk(world_size)[rank].clone() for each in (rows, ids))
    return Outputs({"projections": rows.requires_grad_()}, {"ids": ids, "genuine": ids >= 0})


def _plain(objective: NPID, outputs: Outputs, step: int, z: float | None = None) -> Any:
    """Equations 4 to 8, of one image and one row after another, and Z of this batch."""
    bank = normalize(objective.bank.rows)
    negatives, chance = objective._negatives(step).tolist(), NEGATIVES / SAMPLES
    exponentials = [
        [(normalize(row, dim=0) @ bank[n] / 0.2).exp() for n in (sample, *negatives)]
        for row, sample in zip(outputs.rows["projections"], outputs.fixed["ids"].tolist())
    ]
    own = SAMPLES * sum(float(e.detach()) for each in exponentials for e in each) / (IMAGES * 21)
    total = torch.zeros((), dtype=torch.float64)
    for first, *others in exponentials:
        p = first / (z or own)
        total = total - (p / (p + chance)).log()
        for each in others:
            total = total - (chance / (each / (z or own) + chance)).log()
    return total / IMAGES, own


def _on_a_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    objective, outputs = _objective(), _outputs(0, rank, world_size)
    value = objective.loss(outputs, 4).value
    value.backward()
    objective.after_step(outputs, 4, 100, TAKEN)
    gradient = outputs.rows["projections"].grad
    return {"value": value.detach(), "gradient": gradient, "log_z": objective.noise.log_z}  # type: ignore[dict-item]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_estimate_is_the_papers_on_any_number_of_processes(world_size: int) -> None:
    objective, outputs = _objective(), _outputs()
    expected, z = _plain(objective, outputs, 4)
    found = run_ranks(_on_a_rank, world_size)
    # Z takes no gradient, as in the authors' code.
    (gradient,) = torch.autograd.grad(
        _plain(objective, outputs, 4, z)[0], outputs.rows["projections"]
    )
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    torch.testing.assert_close(rows, gradient, rtol=1e-8, atol=1e-12)
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach())
        assert float(each["log_z"]) == pytest.approx(math.log(z), rel=1e-12)


def test_the_normaliser_is_that_of_the_first_batch_that_was_taken() -> None:
    objective = _objective()
    objective.after_step(_outputs(), 0, 100, LEFT_OUT)
    assert objective.noise.log_z.isinf()
    _, z = _plain(objective, _outputs(), 0)
    objective.after_step(_outputs(), 0, 100, TAKEN)
    outputs = _outputs(1)
    expected, other = _plain(objective, outputs, 1, z)
    assert abs(z / other - 1) > 1e-3, "a control: this batch's is another"
    torch.testing.assert_close(objective.loss(outputs, 1).value, expected)
    objective.after_step(outputs, 1, 100, TAKEN)
    assert float(objective.noise.log_z) == pytest.approx(math.log(z), rel=1e-12)


def test_an_estimate_without_negatives_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--objective.estimate nce wants --objective.negatives"):
        NPIDConfig(estimate="nce", negatives=0)


# --- bits ---


@pytest.mark.parametrize(("bits", "bound"), [(32, 0.0), (16, 2**-12), (8, 1 / 254)])
def test_rows_are_kept_to_half_a_step_whatever_the_model_becomes(bits: Any, bound: float) -> None:
    """Half a unit in the last place of numbers below 1, or half of a 127th."""
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(30, 8, generator=generator))
    rows[4] = 0
    table = PerSample(rows, bits).to(torch.bfloat16).double() if bits < 32 else PerSample(rows)
    assert table.rows.nbytes * 8 == rows.numel() * bits
    assert float((table.read().double() - rows.double()).abs().max()) <= bound
    assert not table.read(torch.tensor([4])).any()
    new = normalize(torch.randn(2, 8, generator=generator))
    table.write(torch.tensor([7, 3]), new, torch.tensor([True, True]))
    assert float((table.read(torch.tensor([7, 3])).double() - new.double()).abs().max()) <= bound


@pytest.mark.parametrize("bits", [16, 8])
def test_the_loss_of_fewer_bits_is_near_the_whole_ones(bits: Any) -> None:
    outputs = _outputs()
    values = [
        float(
            _objective(estimate="softmax", memory_bits=each, negatives=0)
            .loss(outputs, 0)
            .value.detach()
        )
        for each in (32, bits)
    ]
    # Logits are off by at most sqrt(D) half steps over the temperature.
    assert 0 < abs(values[0] - values[1]) < 2 * 4 * {16: 2**-12, 8: 1 / 254}[bits] / 0.2
