"""A plan is counted from the real networks, refuses what cannot start, and scales as it must."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ntxent.triton_plan import flop_count
from launch.__main__ import main
from launch.plan_command import GPUS as OFFERED_GPUS
from tests.trainer.runs import SMALL_ENCODER, pack_images, tiny_config, tiny_mocov3_config
from trainer.config import RunConfig
from trainer.encoders import EncoderConfig
from trainer.errors import ConfigError
from trainer.networks import build_objective
from trainer.objectives.moco import MoCoConfig
from trainer.optim import OptimConfig, build_optimizer
from trainer.planner.calibrate import calibration
from trainer.planner.census import Census, count_step
from trainer.planner.contrast import contrast
from trainer.planner.ledger import Ledger
from trainer.planner.memory import counted, memory
from trainer.planner.plan import (
    Images,
    Plan,
    images_of,
    make_plan,
    plan_from_json,
    plan_to_json,
)
from trainer.planner.probe import Reading
from trainer.planner.rates import GPUS, Gpu, Rates
from trainer.planner.shares import optimizer_copies
from trainer.planner.table import table
from trainer.recipes import RECIPES
from trainer.strategy import StrategyConfig

IMAGES = Images(count=100_000, pixels=64 * 64, bytes=2_500, source="test")
NOWHERE = Path("nowhere")
MIB = 2**20


def small(**changes: Any) -> RunConfig:
    return tiny_config(NOWHERE, NOWHERE, **{"encoder": SMALL_ENCODER, "batch": 64, **changes})


def rates(gpu: str = "h100-80g", **changes: Any) -> Rates:
    return Rates(gpu=GPUS[gpu], **changes)


def plan(config: RunConfig, nodes: int = 1, gpus: int = 8, **changes: Any) -> Plan:
    return make_plan(
        config, nodes=nodes, gpus=gpus, rates=changes.pop("rates", rates()), images=IMAGES
    )


def tiny_gpu(mib: float) -> Rates:
    gpu = dataclasses.replace(GPUS["h100-80g"], memory=mib * MIB)
    return Rates(gpu=gpu, context_bytes=0.0)


def flow(found: Plan, part: str) -> Any:
    return next(each for each in found.flows if each.part == part)


# --- memory: counted against real tensors -------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["small", "resnet18"])
def test_counted_activations_are_what_autograd_keeps_of_real_tensors(
    precision: Any, encoder: str
) -> None:
    model = SMALL_ENCODER if encoder == "small" else EncoderConfig(name="resnet18")
    config = small(encoder=model, precision=precision)
    census = count_step(config, 16, local_batch=16, world_size=1, device="cpu")

    objective = build_objective(config).to(memory_format=torch.channels_last)
    own = {t.untyped_storage().data_ptr() for t in objective.state_dict().values()}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    views = torch.randn(32, 3, 32, 32).to(dtype).to(memory_format=torch.channels_last)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        queries = objective(views).queries
    kept[queries.untyped_storage().data_ptr()] = queries.untyped_storage()
    own.add(views.untyped_storage().data_ptr())
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert census.saved == pytest.approx(real, rel=0.03)


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
    config = tiny_mocov3_config(NOWHERE, NOWHERE, encoder=SMALL_ENCODER)
    census = count_step(config, 8, local_batch=8, world_size=2)
    objective = build_objective(config)
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert census.bytes["parameters"] == sum(p.nbytes for p in objective.parameters())
    assert census.bytes["buffers"] == sum(b.nbytes for b in objective.buffers())
    assert census.bytes["gradients"] == sum(p.nbytes for p in trained)
    assert census.parameters > census.trainable == sum(p.numel() for p in trained)


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
    whole = counted(config, 8, rates())
    half = counted(config, 16, rates())
    assert half.bytes["activations"] == pytest.approx(whole.bytes["activations"] / 2, rel=0.05)
    split = dataclasses.replace(config, micro_batch=32)
    pieces = counted(split, 8, rates())
    assert pieces.images == 32
    assert pieces.bytes["activations"] < whole.bytes["activations"] / 10
    assert pieces.bytes["crops"] == whole.bytes["crops"]
    double = counted(dataclasses.replace(split, batch=8192), 8, rates())
    assert double.bytes["activations"] == pieces.bytes["activations"]


def test_activation_checkpointing_trades_memory_for_flops() -> None:
    config = small(encoder=EncoderConfig(name="resnet18"), batch=512)
    kept = counted(config, 8, rates())
    again = counted(dataclasses.replace(config, activation_checkpointing=True), 8, rates())
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
    whole = counted(config, 8, rates()).bytes
    shared = dataclasses.replace(config, strategy=StrategyConfig(name=strategy))
    part = counted(shared, 8, rates()).bytes
    for name, share in (("parameters", parameters), ("gradients", gradients)):
        assert part[name] == pytest.approx(whole[name] / share, rel=0.01)
    assert part["optimizer"] < whole["optimizer"] / 3


def test_reference_loss_holds_the_matrix_and_tiles_do_not() -> None:
    config = small()
    matrix = dataclasses.replace(config.objective, loss_implementation="reference")
    tiled = contrast(config, 1024, 4, "cuda")
    whole = contrast(dataclasses.replace(config, objective=matrix), 1024, 4, "cuda")
    assert whole.bytes > 3 * 4 * tiled.rows * tiled.columns > 20 * tiled.bytes


def test_loss_work_is_what_the_kernels_count() -> None:
    found = contrast(small(), 2048, 4, "cuda")
    assert (found.rows, found.columns) == (4096, 16384)
    exact = flop_count(found.rows, found.columns, found.dim)
    assert found.flops == pytest.approx(exact.total, rel=0.02)
    assert found.exponentials == pytest.approx(exact.exponentials, rel=0.02)


# --- what travels, and how long it takes --------------------------------------------------------


def test_traffic_follows_the_number_of_processes() -> None:
    config = small(batch=1024)
    one, eight = plan(config, gpus=1), plan(config, gpus=8)
    assert one.flows == ()
    assert one.time.exposed == 0
    rows, dim = 2 * 1024 // 8, config.head.out_dim
    assert flow(eight, "embeddings").nvlink_bytes == 7 * rows * dim * 4
    assert flow(eight, "log-sum-exps").nvlink_bytes == 7 * rows * 3 * 4
    gradients = eight.trainable * 4
    assert flow(eight, "gradients").nvlink_bytes == pytest.approx(2 * gradients * 7 / 8)
    assert flow(eight, "gradients").network_bytes == 0
    two_nodes = plan(config, nodes=2, gpus=4)
    assert flow(two_nodes, "gradients").network_bytes == pytest.approx(2 * gradients * 7 / 8)
    assert flow(two_nodes, "embeddings").seconds > flow(eight, "embeddings").seconds


def test_statistics_travel_as_the_settings_say() -> None:
    synchronised = plan(small(batch=1024))
    assert flow(synchronised, "BatchNorm, forward").collectives == 5  # three, and the head's two
    own = plan(small(batch=1024, sync_batch_norm=False))
    assert not [each for each in own.flows if "BatchNorm" in each.part]
    grouped = plan(small(batch=1024, batch_norm_group=4))
    ratio = (
        flow(synchronised, "BatchNorm, forward").nvlink_bytes
        / flow(grouped, "BatchNorm, forward").nvlink_bytes
    )
    assert ratio == pytest.approx(7 / 3)
    moco = MoCoConfig(queue=64, key_batch_norm="shuffle")
    assert flow(plan(small(batch=1024, objective=moco)), "shuffled keys").nvlink_bytes > 0


def test_compressed_gradients_halve_their_bytes() -> None:
    config = small(batch=1024)
    half = dataclasses.replace(config, strategy=StrategyConfig(compress_gradients="bf16"))
    plain = flow(plan(config), "gradients").nvlink_bytes
    assert flow(plan(half), "gradients").nvlink_bytes == plain / 2


def test_the_bottleneck_is_what_was_made_slow() -> None:
    config = dataclasses.replace(RECIPES["simclr-r50"](), batch=2048)
    assert plan(config, rates=rates(cores=64)).time.bottleneck == "compute"
    assert plan(config, rates=rates(loader_rate=10.0)).time.bottleneck == "loader"
    slow = rates(link_bytes=1e6)
    assert plan(config, nodes=2, gpus=4, rates=slow).time.bottleneck == "network"
    weak = rates(augment_fraction=1e-5)
    assert plan(config, rates=weak).time.bottleneck == "augmentation"


def test_faster_gpus_and_more_of_them_take_less_time() -> None:
    config = dataclasses.replace(RECIPES["simclr-r50"](), batch=2048)
    generations = [plan(config, rates=rates(gpu)).time.device for gpu in ("a100-80g", "h100-80g")]
    assert generations[0] > 1.2 * generations[1]
    few, many = plan(config, gpus=4, rates=rates(cores=99)), plan(config, rates=rates(cores=99))
    assert few.time.seconds == pytest.approx(2 * many.time.seconds, rel=0.1)
    assert few.gpu_hours == pytest.approx(many.gpu_hours, rel=0.1)


def test_pieces_cost_what_their_norm_says() -> None:
    config = small(batch=8192, micro_batch=512)
    whole = plan(dataclasses.replace(config, micro_batch=0))
    exact = plan(config)
    piece = plan(dataclasses.replace(config, micro_batch_norm="piece"))
    layers = 5
    assert whole.time.passes == 1
    assert exact.time.passes == pytest.approx((2 * layers + 3) / 3)
    assert piece.time.passes == pytest.approx(4 / 3)


# --- what to change -----------------------------------------------------------------------------


def test_what_does_not_fit_gets_a_micro_batch_and_a_number_of_gpus_that_do() -> None:
    config = small(batch=1024)
    needed = plan(config, gpus=2, rates=tiny_gpu(1e6)).memory.total
    tight = tiny_gpu(0.6 * needed / MIB)
    found = plan(config, gpus=2, rates=tight)
    assert not found.fits
    assert found.remedy is not None
    assert "DOES NOT FIT" in table(found)
    piece = found.remedy.micro_batch
    assert 0 < piece < 512
    assert plan(dataclasses.replace(config, micro_batch=piece), gpus=2, rates=tight).fits
    larger = dataclasses.replace(config, micro_batch=piece + 32)
    assert not plan(larger, gpus=2, rates=tight).fits
    enough = found.remedy.gpus
    assert enough > 2
    assert enough % 2 == 0
    assert plan(config, nodes=enough // 2, gpus=2, rates=tight).fits
    assert not plan(config, nodes=enough // 2 - 1 or 1, gpus=2, rates=tight).fits


def test_what_nothing_helps_is_said() -> None:
    found = plan(small(batch=64), rates=tiny_gpu(0.01))
    assert found.remedy is not None
    assert (found.remedy.gpus, found.remedy.micro_batch) == (0, 0)
    assert "smaller encoder" in table(found)


def test_what_fits_gets_no_advice() -> None:
    found = plan(small(batch=64))
    assert found.fits
    assert found.remedy is None
    assert "fits" in table(found)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr-r5", "--gpu", "h100-80g"], "did you mean simclr-r50?"),
        (["simclr-r50"], "--gpu NAME is one of a100-40g"),
        (["simclr-r50", "--gpu", "h100"], "did you mean h100-80g?"),
        (["simclr-r50", "--gpu", "h100-80g", "--calibrate"], "--gpu and --calibrate"),
        (["simclr-r50", "--calibrate", "--flops-fraction", "0.5"], "--calibrate measures that"),
        (["simclr-r50", "--gpu", "h100-80g", "--nodes", "0"], "--nodes must be above 0"),
        (["simclr-r50", "--gpu", "h100-80g", "--link-gbps", "-1"], "--link-gbps must be above 0"),
        (["simclr-r50", "--gpu", "h100-80g", "--flops-fraction", "2"], "at most 1"),
        (["simclr-r50", "--gpu", "h100-80g", "--gpus", "3"], "does not divide by 3"),
        (
            ["simclr-r50", "--gpu", "h100-80g", "--images", "9"],
            "more than the 9 samples of its data set",
        ),
        (["simclr-r50", "--gpu", "h100-80g", "--data.train", "no.beton"], "no.beton"),
        (["mocov2-r50", "--gpu", "h100-80g", "--micro-batch", "8"], "--sync-batch-norm"),
        (["simclr-r50", "--gpu", "h100-80g", "--encoder.name", "resnet51"], "resnet50"),
    ],
    ids=lambda value: " ".join(value)[-36:] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_gets_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_misspelt_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "simclr-r50", "--gpu", "h100-80g", "--bacth", "8"]) == 2
    assert "--bacth" in capsys.readouterr().err


def test_networks_that_look_at_values_are_named() -> None:
    encoder = EncoderConfig(name="tests.trainer.test_planner:curious_encoder", image_size=32)
    with pytest.raises(ConfigError, match="curious_encoder cannot be counted without data"):
        count_step(small(encoder=encoder), 4, local_batch=4, world_size=1)


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


# --- in and out ---------------------------------------------------------------------------------


def test_json_holds_the_plan_and_what_follows_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--batch", "512", "--nodes", "2", "--gpus", "4", "--gpu", "a100-40g", "--json"]
    assert main(["plan", "simclr-cifar10-r18", *settings]) == 0
    values = json.loads(capsys.readouterr().out)
    found = plan_from_json(values)
    assert plan_to_json(found) == values
    assert values["summary"]["fits"] is found.fits is True
    assert values["summary"]["gpu_hours"] == pytest.approx(8 * values["summary"]["hours"])
    assert found.run.peak_lr == pytest.approx(1.0 * 512 / 256)
    values["recepi"] = "x"
    with pytest.raises(ConfigError, match="did you mean recipe"):
        plan_from_json(values)


def test_table_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mocov3-cifar10-r18", "--gpus", "8", "--gpu", "b200-180g"]) == 0
    text = capsys.readouterr().out
    for word in (
        "fits",
        "peak learning rate",
        "activations",
        "embeddings",
        "bound by the",
        "GPU-hours",
        "cores at",
        "MB/s",
        "stated",
    ):
        assert word in text


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_can_be_planned(recipe: str) -> None:
    config = RECIPES[recipe]()
    config = dataclasses.replace(config, batch=8)
    images = images_of(config, known=False)
    found = make_plan(config, nodes=1, gpus=2, rates=rates(), images=images)
    assert found.fits
    assert found.images_per_second > 0


def test_images_come_from_the_file_where_there_is_one(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=6)
    config = tiny_config(data, tmp_path / "run")
    found = images_of(config)
    assert (found.count, found.pixels) == (6, 1600)
    assert 0 < found.bytes <= 4800
    assert images_of(config, count=99).count == 99
    nameless = dataclasses.replace(config, recipe="")
    with pytest.raises(ConfigError, match="--images"):
        images_of(nameless, known=False)


def test_the_front_door_knows_the_same_gpus() -> None:
    assert tuple(GPUS) == OFFERED_GPUS


# --- calibration --------------------------------------------------------------------------------


def reading(batch: int, peak: float, seconds: float) -> Reading:
    return Reading(
        batch=batch,
        device="cpu",
        name="test",
        memory=8e9,
        peak_bytes=peak,
        step_seconds=seconds,
        wait_seconds=0.0,
        augment_seconds=0.001 * batch,
        loss_seconds=1e-6 * batch**2,
        update_seconds=0.01,
        core_seconds=1e-3,
    )


def test_calibration_finds_the_line_that_readings_lie_on() -> None:
    config = small()
    counts = [count_step(config, b, local_batch=b, world_size=1, device="cpu") for b in (32, 64)]
    peaks = [5e8 + 1.5 * count.peak for count in counts]
    readings = [
        reading(b, peak, 0.2 + 0.02 * b + 0.001 * b + 1e-6 * b**2 + 0.01)
        for b, peak in zip((32, 64), peaks)
    ]
    found = calibration(config, readings, counts)
    assert found.memory_factor == pytest.approx(1.5)
    assert found.base_bytes == pytest.approx(5e8)
    assert found.image_seconds == pytest.approx(0.02)
    assert found.base_seconds == pytest.approx(0.2)

    measured = Rates(gpu=GPUS["a100-80g"], calibration=found)
    large = dataclasses.replace(config, batch=256)
    planned = plan(large, gpus=1, rates=measured)
    expected = 0.2 + 0.021 * 256 + 1e-6 * 256**2 + 0.01
    assert planned.time.seconds == pytest.approx(expected, rel=0.02)
    census = counted(large, 1, measured)
    assert planned.memory.total == pytest.approx(5e8 + 1.5 * census.peak)
    assert planned.memory.limit == 8e9


def test_processes_on_a_cpu_share_its_memory() -> None:
    census: Census = counted(small(), 2, rates())
    config = small()
    counts = [count_step(config, b, local_batch=b, world_size=1, device="cpu") for b in (32, 64)]
    found = calibration(config, [reading(32, 6e8, 1.0), reading(64, 7e8, 2.0)], counts)
    shared = memory(census, Rates(gpu=_any_gpu(), calibration=found), processes=4)
    assert shared.limit == 2e9


def _any_gpu() -> Gpu:
    return next(iter(GPUS.values()))


@pytest.mark.slow
def test_calibrate_measures_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pack_images(tmp_path, count=40)
    settings = ["--data.train", str(data), "--batch", "40", "--calibrate", "--json"]
    assert main(["plan", "digits-demo", *settings, "--out", str(tmp_path / "run")]) == 0
    found = plan_from_json(json.loads(capsys.readouterr().out))
    assert found.rates.calibration is not None
    assert 2e8 < found.rates.calibration.base_bytes < 4e9
    assert 0 < found.time.seconds < 60
    assert not (tmp_path / "run").exists()
