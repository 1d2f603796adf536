"""A plan's traffic and time follow processes, GPUs and settings as they must."""

import dataclasses

import pytest

from tests.trainer.plans import flow, plan, rates, small
from trainer.objectives.moco import MoCoConfig
from trainer.parallel.strategy import StrategyConfig
from trainer.recipes import RECIPES


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
