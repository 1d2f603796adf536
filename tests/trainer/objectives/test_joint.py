"""Several objectives at once: the weighted sum of each alone, by one encoder."""

import copy
import json
from collections.abc import Iterator

import pytest
import torch

from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from launch.settings_arguments import parse_settings
from tests.trainer.runs import small_encoder
from trainer.config import RunConfig, differences, from_json, to_json
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.joint import JointConfig, TaskConfig
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.parts.joint import Joint
from trainer.objectives.rotation import RotationConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.planner.loss_cost import loss_costs
from trainer.recipes import RECIPES
from trainer.state.settings import settings

HEAD = HeadConfig(hidden_dim=64, out_dim=16)
GIVEN = Given(num_samples=20, side=32)
TASKS = (
    TaskConfig(task=SimCLRConfig(temperature=0.5)),
    TaskConfig(task=RotationConfig(), weight=0.4, side=16, scale=(0.1, 0.2)),
    TaskConfig(task=NPIDConfig(), weight=0.1),
)
CONFIG = JointConfig(tasks=TASKS)


def _joint(config: JointConfig = CONFIG, head: HeadConfig = HEAD) -> Joint:
    torch.manual_seed(0)
    encoder = small_encoder().double()
    encoder.feature_dim = 64  # type: ignore[assignment]
    return config.build(encoder, head, GIVEN).double()  # type: ignore[arg-type]


def _inputs(images: int = 6) -> Inputs:
    rng = torch.Generator().manual_seed(1)
    views = ((2, 32), (1, 16), (1, 32))
    groups = tuple(
        torch.randn(count, images, 3, side, side, dtype=torch.float64, generator=rng)
        for count, side in views
    )
    ids = torch.arange(images)
    return Inputs(groups, ids, ids >= 0)


def test_every_task_has_views_of_its_own() -> None:
    crop = CropConfig(size=32, scale=(0.2, 1.0))
    plan = CONFIG.views(crop, AugmentConfig())
    assert [(len(group.looks), group.crop.size) for group in plan] == [(2, 32), (1, 16), (1, 32)]
    assert [group.crop.scale for group in plan] == [(0.2, 1.0), (0.1, 0.2), (0.2, 1.0)]


def test_loss_and_gradient_are_the_weighted_sums_of_those_alone() -> None:
    joint, inputs = _joint(), _inputs()
    loss = joint.loss(joint(inputs), 0)
    names = [name for name, _ in joint.encoder.named_parameters()]
    ours = torch.autograd.grad(loss.value, list(joint.encoder.parameters()))
    expected, gradients = 0.0, [torch.zeros_like(each) for each in ours]
    for number, (each, views) in enumerate(zip(TASKS, inputs.views)):
        alone = copy.deepcopy(list(_joint().tasks.values())[number])
        value = alone.loss(alone(inputs._replace(views=(views,))), 0).value
        assert float(loss.metrics[f"{each.task.name}_loss"]) == pytest.approx(float(value.detach()))
        expected += each.weight * float(value.detach())
        theirs = torch.autograd.grad(value, list(alone.encoder.parameters()))
        gradients = [a + each.weight * b for a, b in zip(gradients, theirs)]
    assert float(loss.value.detach()) == pytest.approx(expected, rel=1e-12)
    for name, mine, other in zip(names, ours, gradients):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=name)
    assert {"simclr_contrastive_top1", "rotation_top1", "npid_contrastive_top1"} < set(loss.metrics)


def test_the_encoder_has_one_name_and_copies_keep_it_one() -> None:
    joint = _joint()
    for each in (joint, copy.deepcopy(joint)):
        assert not [
            key for key in each.state_dict() if key.startswith("tasks.") and "encoder" in key
        ]
        assert all(task.encoder is each.encoder for task in each.tasks.values())
        assert sum(key.startswith("encoder.") for key in each.state_dict()) == len(
            each.encoder.state_dict()
        )


def test_what_one_task_clusters_is_given_its_own_outputs() -> None:
    head = HeadConfig(hidden_dim=64, out_dim=16)
    cluster = DeepClusterV2Config(prototypes=3, heads=2, small_views=0)
    tasks = (TaskConfig(task=RotationConfig()), TaskConfig(task=cluster))
    joint = _joint(JointConfig(tasks=tasks), head)
    rng = torch.Generator().manual_seed(1)
    views = tuple(
        torch.randn(count, 20, 3, 32, 32, dtype=torch.float64, generator=rng) for count in (1, 2)
    )
    ids = torch.arange(20)

    def whole_epoch() -> Iterator[Outputs]:
        with torch.no_grad():
            yield joint(Inputs(views, ids, ids >= 0))

    joint.before_epoch(0, whole_epoch)
    task = joint.tasks["deepclusterv2"]
    assert task.memory.rows.abs().sum((1, 2)).gt(0).all()  # type: ignore[union-attr]
    assert (task.clusters >= 0).all()  # type: ignore[union-attr, operator]


def test_two_of_a_kind_and_two_that_cluster_are_refused() -> None:
    one = TaskConfig(task=RotationConfig())
    with pytest.raises(ConfigError, match="one of each kind, found rotation, rotation"):
        JointConfig(tasks=(one, one))
    with pytest.raises(ConfigError, match="found none"):
        JointConfig(tasks=())


def test_plans_count_every_loss() -> None:
    config = RECIPES["essl-r50"]()
    simclr, rotation = loss_costs(config, 64, 4)
    assert (simclr.rows, simclr.gathers) == (128, True)
    assert (rotation.rows, rotation.columns, rotation.gathers) == (256, 4, False)


def test_settings_carry_a_tasks_number() -> None:
    words = ["--data.train", "x.beton", "--objective.tasks.1.weight", "0.25"]
    config = parse_settings("pretrain", "essl-cifar10-r18", words)
    assert isinstance(config.objective, JointConfig)
    assert [each.weight for each in config.objective.tasks] == [1.0, 0.25]
    assert from_json(RunConfig, to_json(config)) == config
    found = {setting.key: setting.flag for setting in settings(config)}
    assert found["objective.tasks.1.weight"] == "--objective.tasks.1.weight"
    assert found["objective.tasks.0.task.temperature"] == "--objective.tasks.0.temperature"
    with pytest.raises(ConfigError, match=r"did you mean --objective\.tasks\.1\.weight"):
        parse_settings("pretrain", "essl-cifar10-r18", ["--objective.tasks.1.weigth", "1"])


def test_a_setting_that_differs_is_named_by_its_task() -> None:
    words = ["--data.train", "x.beton"]
    saved = to_json(parse_settings("pretrain", "essl-cifar10-r18", words))
    other = json.loads(json.dumps(saved))
    other["objective"]["tasks"][1]["weight"] = 0.5
    other["objective"]["tasks"][0]["task"]["temperature"] = 0.2
    assert differences(saved, other) == [
        "objective.tasks.0.task.temperature: 0.5 -> 0.2",
        "objective.tasks.1.weight: 0.4 -> 0.5",
    ]
