"""BYOL and SimSiam: which view meets which, what takes a gradient, and what it comes to."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn.functional import normalize

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.trainer.runs import checkpoint_bytes, inputs_of, pack_images, train
from tests.trainer.tiny import tiny_simsiam_config
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Objective, Outputs
from trainer.objectives.byol import BYOL, BYOLConfig
from trainer.objectives.simsiam import SimSiam, SimSiamConfig
from trainer.optim.schedule import ScheduleConfig

IMAGES, DIM = 12, 6
HEAD = HeadConfig(layers=2, hidden_dim=16, out_dim=DIM, last_norm="none")


def _rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, 2, DIM, generator=generator, dtype=torch.float64)


def _plain(name: str, predictions_NVD: torch.Tensor, targets_NVD: torch.Tensor) -> torch.Tensor:
    """As the papers have it, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for predictions_VD, targets_VD in zip(predictions_NVD, targets_NVD):
        for mine in (0, 1):
            p, z = (normalize(each, dim=0) for each in (predictions_VD[mine], targets_VD[1 - mine]))
            total = total + ((p - z).square().sum() if name == "byol" else -(p @ z) / 2)
    return total / len(predictions_NVD)


def _loss(name: str, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    kind, fixed = (BYOL, "keys") if name == "byol" else (SimSiam, "projections")
    outputs = Outputs({"predictions": predictions}, {fixed: targets})
    return kind.loss(object.__new__(kind), outputs, 0).value


def _on_a_rank(rank: int, world_size: int, name: str) -> dict[str, torch.Tensor]:
    predictions, targets = (_rows(seed).chunk(world_size)[rank].clone() for seed in (0, 1))
    value = _loss(name, predictions.requires_grad_(), targets)
    value.backward()
    return {"value": value.detach(), "gradient": predictions.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["byol", "simsiam"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_are_the_papers(name: str, world_size: int) -> None:
    predictions, targets = _rows(0).requires_grad_(), _rows(1)
    expected = _plain(name, predictions, targets)
    (gradient,) = torch.autograd.grad(expected, predictions)
    found = run_ranks(_on_a_rank, world_size, name)
    for each in found:
        torch.testing.assert_close(each["value"], expected.detach(), rtol=1e-13, atol=0)
    rows = torch.cat([each["gradient"] for each in found]) / world_size
    torch.testing.assert_close(rows, gradient, rtol=1e-12, atol=1e-15)


def test_losses_of_what_agrees_and_of_what_does_not() -> None:
    same = _rows(0)
    for name, best, worst in (("byol", 0.0, 8.0), ("simsiam", -1.0, 1.0)):
        assert float(_loss(name, same, 3 * same.flip(1))) == pytest.approx(best, abs=1e-12)
        assert float(_loss(name, same, -same.flip(1))) == pytest.approx(worst)


def _built(config: BYOLConfig | SimSiamConfig) -> Objective:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar-stride2"))
    return config.build(encoder, HEAD, Given(side=32)).double()


def _views() -> Any:
    return inputs_of(torch.randn(2, 4, 3, 32, 32, dtype=torch.float64))


def test_simsiams_projections_take_no_gradient_as_targets() -> None:
    """With the targets as constants the gradient is the same: nothing reaches them."""
    objective, inputs = _built(SimSiamConfig(predictor=HEAD)), _views()
    outputs = objective(inputs)
    assert not outputs.fixed["projections"].requires_grad
    assert outputs.rows["predictions"].requires_grad
    projected = torch.stack([objective.head(objective.encoder(x)) for x in inputs.views[0]], 1)
    torch.testing.assert_close(outputs.fixed["projections"], projected)
    assert torch.equal(
        objective.embedding(outputs), outputs.fixed["projections"].transpose(0, 1).flatten(0, 1)
    )


def test_byols_keys_are_those_of_the_copy_and_the_copy_follows() -> None:
    objective, inputs = _built(BYOLConfig(predictor=HEAD, momentum=0.9)), _views()
    outputs = objective(inputs)
    assert outputs.rows["predictions"].shape == outputs.fixed["keys"].shape == (4, 2, DIM)
    weight, key = objective.head.layers[0][0].weight, objective.key.head.layers[0][0].weight
    with torch.no_grad():
        weight += 1
    before = key.clone()
    objective.after_step(outputs, 0, 10**9, torch.zeros(()))
    torch.testing.assert_close(key, 0.9 * before + 0.1 * weight)


@pytest.mark.parametrize("config", [BYOLConfig(), SimSiamConfig()])
def test_a_predictor_of_other_dimensions_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"--objective.predictor.out-dim is \d+ and --head.out-d"):
        _built(config)


def test_a_steady_predictor_learns_on_where_all_else_has_a_rate_of_0(tmp_path: Path) -> None:
    falls = ScheduleConfig(warmup_epochs=0, kind="steps", milestones=(0.2,), gamma=0.0)
    data = pack_images(tmp_path / "data")
    config = tiny_simsiam_config(data, tmp_path / "run", steps=3, schedule=falls)
    saved = []
    for stop_at in (1, 0):
        train(1, config, stop_at=stop_at)
        tensors = safetensors.torch.load(checkpoint_bytes(config.out)["model.safetensors"])
        saved.append({n: t for n, t in tensors.items() if n.endswith(("weight", "bias"))})
    moved = {name.split(".")[0] for name in saved[0] if not saved[1][name].equal(saved[0][name])}
    assert moved == {"predictor"}
