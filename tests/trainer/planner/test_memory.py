"""A plan's memory is counted from the real networks, optimizers and kernels."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.roofline import flop_count
from common.errors import ConfigError
from tests.trainer.objectives.test_contract import EVERY
from tests.trainer.plans import NOWHERE, small
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.tiny import tiny_mocov3_config
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.base import blank_inputs
from trainer.optim.optimizers import OptimConfig, build_optimizer
from trainer.parallel.networks import build_objective
from trainer.parallel.strategy import StrategyConfig
from trainer.planner.ledger import Ledger
from trainer.planner.loss_cost import loss_bytes, loss_costs
from trainer.planner.step_cost import count_step, optimizer_copies


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["small", "resnet18"])
def test_counted_activations_are_what_autograd_keeps_of_real_tensors(
    precision: Any, encoder: str
) -> None:
    model = SMALL_ENCODER if encoder == "small" else EncoderConfig(name="resnet18")
    config = small(encoder=model, precision=precision, batch=16)
    step_cost = count_step(config, 1, "cpu")

    assert step_cost.saved == pytest.approx(kept_by_autograd(config), rel=0.03)


@pytest.mark.parametrize("name", EVERY)
def test_activations_of_every_objective_are_counted_to_the_byte(tmp_path: Path, name: str) -> None:
    images = pack_images(tmp_path, count=30) if name == "frameorder" else NOWHERE
    config = dataclasses.replace(EVERY[name](images, tmp_path, precision="fp32"), batch=16)
    step_cost = count_step(config, 1, "cpu", 120)
    # Scalars that autograd keeps of real tensors, and not of fake ones.
    assert step_cost.saved == pytest.approx(kept_by_autograd(config), rel=1e-3)


def kept_by_autograd(config: RunConfig) -> int:
    """Bytes that a forward pass of real images leaves for the backward pass, outputs included."""
    objective = build_objective(config, None, 120).to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    inputs = blank_inputs(config.view_plan(), config.batch, dtype)
    for views in inputs.views:
        views.normal_()
    given = (*objective.state_dict().values(), *objective.buffers(), *inputs.views)
    own = {t.untyped_storage().data_ptr() for t in (*given, inputs.ids_N, inputs.labels_N)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        outputs = objective(inputs)
    for part in outputs:
        for rows in part.values():
            keep(rows)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def test_ledger_counts_a_storage_once_and_forgets_what_is_freed() -> None:
    with Ledger() as ledger:
        with ledger.phase("activations"):
            x = torch.zeros(1000)
            y = x.view(10, 100)[3:]
            z = x + 1
        assert ledger.live["activations"] == 8000
        del z
        assert ledger.live["activations"] == 4000
        del x
        assert ledger.live["activations"] == 4000  # y still holds it
        del y
        assert ledger.live["activations"] == 0
    assert ledger.at_peak["activations"] == 8000


def test_weights_gradients_and_buffers_are_those_of_the_real_networks() -> None:
    config = tiny_mocov3_config(NOWHERE, NOWHERE, encoder=SMALL_ENCODER, batch=16)
    step_cost = count_step(config, 2)
    objective = build_objective(config)
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert step_cost.bytes["parameters"] == sum(p.nbytes for p in objective.parameters())
    assert step_cost.bytes["buffers"] == sum(b.nbytes for b in objective.buffers())
    assert step_cost.bytes["gradients"] == sum(p.nbytes for p in trained)
    assert step_cost.parameters > step_cost.trainable == sum(p.numel() for p in trained)


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(name="lars"),
        OptimConfig(name="sgd", momentum=0.0),
        OptimConfig(name="sgd"),
        OptimConfig(name="adamw"),
    ],
    ids=lambda o: f"{o.name}-{o.momentum}",
)
def test_optimizer_memory_is_that_of_the_real_optimizer(optim: OptimConfig) -> None:
    config = small(optim=optim)
    objective = build_objective(config)
    optimizer = build_optimizer(objective, optim)
    for param in objective.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    shapes = {id(p): p.shape for p in objective.parameters()}
    state = [
        value
        for param, slots in optimizer.state.items()
        for value in slots.values()
        if isinstance(value, torch.Tensor) and value.shape == shapes[id(param)]
    ]
    real = sum(value.nbytes for value in state)
    values = sum(p.nbytes for p in objective.parameters())
    assert optimizer_copies(config) * values == real


def test_memory_grows_with_the_images_in_memory_and_not_with_the_batch() -> None:
    config = small(batch=4096)
    whole = count_step(config, 8)
    half = count_step(config, 16)
    assert half.bytes["activations"] == pytest.approx(whole.bytes["activations"] / 2, rel=0.05)
    split = dataclasses.replace(config, micro_batch=32)
    pieces = count_step(split, 8)
    assert pieces.images == 32
    assert pieces.bytes["activations"] < whole.bytes["activations"] / 10
    assert pieces.bytes["crops"] == whole.bytes["crops"]
    double = count_step(dataclasses.replace(split, batch=8192), 8)
    assert double.bytes["activations"] == pieces.bytes["activations"]


def test_activation_checkpointing_trades_memory_for_flops() -> None:
    config = small(encoder=EncoderConfig(name="resnet18"), batch=512)
    kept = count_step(config, 8)
    again = count_step(dataclasses.replace(config, activation_checkpointing=True), 8)
    assert again.saved < 0.6 * kept.saved
    assert 1.1 * kept.flops < again.flops < 1.4 * kept.flops
    assert again.norms == kept.norms


@pytest.mark.parametrize(
    ("strategy", "parameters", "gradients"),
    [("deepspeed-1", 1, 1), ("deepspeed-2", 1, 8), ("fsdp", 8, 8)],
)
def test_strategies_share_training_state_out(
    strategy: Any, parameters: int, gradients: int
) -> None:
    config = small()
    whole = count_step(config, 8).bytes
    shared = dataclasses.replace(config, strategy=StrategyConfig(name=strategy))
    part = count_step(shared, 8).bytes
    for name, share in (("parameters", parameters), ("gradients", gradients)):
        assert part[name] == pytest.approx(whole[name] / share, rel=0.01)
    assert part["optimizer"] < whole["optimizer"] / 3


def test_reference_loss_holds_the_matrix_and_tiles_do_not() -> None:
    config = small()
    objective = dataclasses.replace(config.objective, loss_implementation="reference")
    matrix = dataclasses.replace(config, objective=objective)
    tiled, whole = (loss_costs(each, 1024, 4)[0] for each in (config, matrix))
    assert loss_bytes(config, whole, "cuda") > 3 * 4 * tiled.rows * tiled.columns
    assert 3 * 4 * tiled.rows * tiled.columns > 20 * loss_bytes(config, tiled, "cuda")


def test_loss_work_is_what_the_kernels_count() -> None:
    (found,) = loss_costs(small(), 2048, 4)
    assert (found.rows, found.columns) == (4096, 16384)
    exact = flop_count(found.rows, found.columns, found.dim)
    assert found.flops == pytest.approx(exact.total, rel=0.02)
    assert found.exponentials == pytest.approx(exact.exponentials, rel=0.02)


def test_networks_that_look_at_values_are_named() -> None:
    encoder = EncoderConfig(name="tests.trainer.planner.test_memory:curious_encoder", image_size=32)
    with pytest.raises(ConfigError, match="curious_encoder cannot be counted without data"):
        count_step(small(encoder=encoder, batch=4), 1)


def curious_encoder() -> torch.nn.Module:
    class Curious(torch.nn.Module):
        feature_dim = 8

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean((2, 3)).float()
            return self.layer(mean if float(mean.sum()) > 0 else -mean)

    return Curious()
