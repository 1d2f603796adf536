"""MoCo v1, v2 and v3 against the papers' algorithms, written down again in plain torch.

The reference is one process that holds everything: it concatenates, takes cross-entropies with
explicit labels, and moves its key encoder before the forward pass, as the published code does.
"""

import copy
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from common.errors import ConfigError
from tests.dist import run_ranks
from tests.trainer.runs import inputs_of
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Objective, ObjectiveConfig
from trainer.objectives.moco import MoCo, MoCoConfig
from trainer.objectives.mocov3 import MoCoV3, MoCoV3Config
from trainer.objectives.parts.key_encoder import momentum_at
from trainer.objectives.parts.key_queue import KeyQueue
from trainer.objectives.parts.shuffle import batch_permutation
from trainer.optim.optimizers import OptimConfig, apply_update, build_optimizer, gradient_norm
from trainer.parallel.networks import synchronise_batch_norm
from trainer.parallel.strategy import launch_fabric

BATCH, STEPS, DIM, LR = 8, 5, 6, 0.5
TAKEN, LEFT_OUT = torch.zeros(()), torch.ones(())

V2_HEAD = HeadConfig(hidden_dim=12, out_dim=DIM, hidden_norm="none", last_norm="none")
V3_HEAD = HeadConfig(hidden_dim=12, out_dim=DIM, last_norm="plain")
V3 = MoCoV3Config(
    temperature=0.4,  # so that 2 T is not 1
    momentum=0.6,
    predictor=HeadConfig(hidden_dim=12, out_dim=DIM, last_norm="none", linear_bias="never"),
)


def v2(queue: int = 20, **changes: Any) -> MoCoConfig:
    """Settings under which a few steps change every part visibly."""
    settings = {"key_batch_norm": "sync", "momentum": 0.7, **changes}
    return MoCoConfig(queue=queue, **settings)


def objective_of(config: ObjectiveConfig, seed: int = 0) -> Objective:
    """A small network with BatchNorm, in float64."""
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(3, 10, 3, stride=2, bias=False),
        norm=nn.BatchNorm2d(10),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
    )
    encoder: Any = nn.Sequential(layers)
    encoder.feature_dim = 10
    network: Encoder = encoder
    head = V3_HEAD if isinstance(config, MoCoV3Config) else V2_HEAD
    return config.build(network, head, Given(seed, BATCH)).double()


def views(step: int) -> torch.Tensor:
    """Both views of step's global batch: (2, BATCH, 3, 8, 8), different in kind."""
    rng = torch.Generator().manual_seed(1000 + step)
    one = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=rng)
    noise = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=rng)
    return torch.stack([one, 2 * one + noise + 1])


# --- the whole of it, on one and several processes, against the reference ---


def _train(rank: int, world_size: int, config: ObjectiveConfig) -> dict[str, Any]:
    """STEPS steps as the loop takes them, through Fabric and DDP."""
    fabric = launch_fabric("cpu", "fp64")
    objective = objective_of(config)
    synchronise_batch_norm(objective, sync_batch_norm=True)
    model = fabric.setup_module(objective)
    optimizer = build_optimizer(objective, OptimConfig(name="sgd", weight_decay=0.0))
    share = BATCH // world_size
    losses = []
    for step in range(STEPS):
        mine = views(step)[:, rank * share : (rank + 1) * share]
        outputs = model(inputs_of(mine, step))
        loss = objective.loss(outputs, step).value
        fabric.backward(loss)
        skipped = apply_update(optimizer, LR, gradient_norm(optimizer))
        objective.after_step(outputs, step, STEPS, skipped)
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    return {"losses": losses, "state": state}


def _train_several(rank: int, world_size: int, configs: list[Any]) -> list[dict[str, Any]]:
    return [_train(rank, world_size, config) for config in configs]


def _reference_v2(config: MoCoConfig) -> dict[str, Any]:
    """The paper's algorithm 1 in the order of its code: average, keys, loss, step, enqueue."""
    start = objective_of(config)
    assert isinstance(start, MoCo)
    query = nn.Sequential(copy.deepcopy(start.encoder), copy.deepcopy(start.head))
    key = copy.deepcopy(query)
    ring = [row.clone() for row in start.queue.rows]
    place = 0
    momentum_buffers = [torch.zeros_like(p) for p in query.parameters()]
    losses = []
    for step in range(STEPS):
        _average(key, query, config.momentum if step else 1.0)
        one, two = views(step)
        with torch.no_grad():
            k = normalize(key(two))
        q = normalize(query(one))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(ring).T], 1)
        labels = torch.zeros(BATCH, dtype=torch.int64)
        loss = cross_entropy(logits / config.temperature, labels)
        _descend(query, loss, momentum_buffers)
        for row in k:  # one by one: no arithmetic to be wrong in
            ring[place] = row
            place = (place + 1) % len(ring)
        losses.append(loss.item())
    _average(key, query, config.momentum)
    state = {**_states(query, key), "queue.rows": torch.stack(ring)}
    return {"losses": losses, "state": state, "place": place}


def _reference_v3(config: MoCoV3Config) -> dict[str, Any]:
    start = objective_of(config)
    assert isinstance(start, MoCoV3)
    query = nn.Sequential(copy.deepcopy(start.encoder), copy.deepcopy(start.head))
    key = copy.deepcopy(query)
    predictor = copy.deepcopy(start.predictor)
    both = nn.Sequential(query, predictor)
    momentum_buffers = [torch.zeros_like(p) for p in both.parameters()]
    losses = []
    for step in range(STEPS + 1):
        m = 1 - (1 - config.momentum) * (1 + math.cos(math.pi * step / STEPS)) / 2
        _average(key, query, m if step else 1.0)
        if step == STEPS:
            break
        q1, q2 = (normalize(both(x)) for x in views(step))
        with torch.no_grad():
            k1, k2 = (normalize(key(x)) for x in views(step))
        tau, labels = config.temperature, torch.arange(BATCH)
        loss = 2 * tau * cross_entropy(q1 @ k2.T / tau, labels)
        loss = loss + 2 * tau * cross_entropy(q2 @ k1.T / tau, labels)
        _descend(both, loss, momentum_buffers)
        losses.append(loss.item())
    states = _states(query, key)
    states.update({f"predictor.{k}": v for k, v in predictor.state_dict().items()})
    return {"losses": losses, "state": states}


@torch.no_grad()
def _average(key: nn.Module, query: nn.Module, m: float) -> None:
    for k, q in zip(key.parameters(), query.parameters(), strict=True):
        k.copy_(m * k + (1 - m) * q)


def _descend(module: nn.Module, loss: torch.Tensor, buffers: list[torch.Tensor]) -> None:
    """SGD with momentum 0.9."""
    grads = torch.autograd.grad(loss, list(module.parameters()))
    with torch.no_grad():
        for p, g, v in zip(module.parameters(), grads, buffers, strict=True):
            v.mul_(0.9).add_(g)
            p.sub_(LR * v)


def _states(query: nn.Sequential, key: nn.Sequential) -> dict[str, torch.Tensor]:
    names = {"encoder": query[0], "head": query[1], "key.encoder": key[0], "key.head": key[1]}
    return {
        f"{part}.{name}": value
        for part, module in names.items()
        for name, value in module.state_dict().items()
    }


CASES: list[ObjectiveConfig] = [
    v2(queue=20),  # a batch of 8 does not divide it
    v2(queue=5),  # smaller than a batch
    v2(queue=16, momentum=1.0),
    V3,
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_the_papers_algorithm_on_any_number_of_processes(world_size: int) -> None:
    by_rank = run_ranks(_train_several, world_size, CASES, init_process_group=False)
    for index, config in enumerate(CASES):
        want = _reference_v3(config) if config is V3 else _reference_v2(config)  # type: ignore[arg-type]
        for rank in range(world_size):
            got = by_rank[rank][index]
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-9)
            state = got["state"]
            if "place" in want:
                assert state.pop("queue.position") == want["place"]
            assert state.keys() == want["state"].keys()
            for name, value in state.items():
                torch.testing.assert_close(value, want["state"][name], rtol=1e-8, atol=1e-9)
    first = objective_of(CASES[0]).state_dict()
    last = by_rank[0][0]["state"]
    for name in ("encoder.conv.weight", "key.encoder.conv.weight", "queue.rows"):
        assert (first[name] - last[name]).abs().max() > 1e-3, f"{name} hardly moved"


# --- what DDP and the optimizer leave alone ---


def _forward_with_own_queue(rank: int, world_size: int) -> dict[str, Any]:
    fabric = launch_fabric("cpu", "fp64")
    objective = objective_of(v2())
    assert isinstance(objective, MoCo)
    synchronise_batch_norm(objective, sync_batch_norm=True)
    model = fabric.setup_module(objective)
    objective.queue.rows.fill_(float(rank))
    for step in range(2):
        fabric.backward(objective.loss(model(inputs_of(views(step), step)), step).value)
    named = list(objective.named_parameters())
    return {
        "rows": objective.queue.rows.unique().tolist(),
        "keys with gradients": [n for n, p in named if n[:4] == "key." and p.requires_grad],
        "queries without": [n for n, p in named if n[:4] != "key." and p.grad is None],
    }


def test_the_queue_is_never_broadcast_and_keys_take_no_gradient() -> None:
    for rank, seen in enumerate(run_ranks(_forward_with_own_queue, 2, init_process_group=False)):
        assert seen == {"rows": [rank], "keys with gradients": [], "queries without": []}


def test_the_optimizer_has_the_queries_parameters_only() -> None:
    objective = objective_of(V3)
    groups = build_optimizer(objective, OptimConfig()).param_groups
    names = {name for group in groups for name in group["param_names"]}
    want = {n for n, _ in objective.named_parameters() if not n.startswith("key.")}
    assert names == want
    assert any(name.startswith("predictor.") for name in names)


@pytest.mark.parametrize("config", [v2(), V3], ids=["v2", "v3"])
def test_a_skipped_step_moves_neither_key_encoder_nor_queue(config: ObjectiveConfig) -> None:
    objective = objective_of(config)
    optimizer = build_optimizer(objective, OptimConfig(name="sgd"))
    for step in range(2):  # so that queries and keys differ
        outputs = objective(inputs_of(views(step), step))
        objective.loss(outputs, step).value.backward()
        skipped = apply_update(optimizer, LR, gradient_norm(optimizer))
        objective.after_step(outputs, step, STEPS, skipped)
        optimizer.zero_grad()
    broken = views(2)
    broken[0, 0] = float("nan")
    outputs = objective(inputs_of(broken, 2))
    objective.loss(outputs, step).value.backward()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    skipped = apply_update(optimizer, LR, gradient_norm(optimizer))
    objective.after_step(outputs, 2, STEPS, skipped)
    assert skipped == 1
    for name, value in objective.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    objective.after_step(objective(inputs_of(views(3), 3)), 2, STEPS, TAKEN)
    assert not torch.equal(objective.state_dict()["key.head.layers.0.linear.weight"],
                           before["key.head.layers.0.linear.weight"])  # fmt: skip


# --- shuffled BatchNorm ---


def _shuffled_keys(rank: int, world_size: int) -> torch.Tensor:
    objective = objective_of(v2(key_batch_norm="shuffle"))
    share = BATCH // world_size
    mine = views(0)[:, rank * share : (rank + 1) * share]
    keys: torch.Tensor = objective(inputs_of(mine, 3)).fixed["keys"]
    return keys


def test_shuffled_keys_have_the_statistics_of_other_images_and_their_own_places() -> None:
    world_size, share = 2, BATCH // 2
    got = torch.cat(run_ranks(_shuffled_keys, world_size))
    permutation = torch.from_numpy(batch_permutation(0, 3, BATCH))
    images = views(0)[1]

    def keys(order: torch.Tensor) -> torch.Tensor:
        """Each group of consecutive places in `order` through BatchNorm on its own."""
        result = torch.empty(BATCH, DIM, dtype=torch.float64)
        for group in order.split(share):
            key = objective_of(v2()).get_submodule("key")
            result[group] = key(images[group]).detach()
        return result

    torch.testing.assert_close(got, keys(permutation), rtol=1e-10, atol=1e-12)
    assert (got - keys(torch.arange(BATCH))).abs().max() > 1e-2


def test_what_is_not_the_same_run_is_said() -> None:
    shuffled, synced = objective_of(v2(key_batch_norm="shuffle")), objective_of(v2())
    assert any("another number of processes" in line for line in shuffled.caveats(True))
    assert any("needs several processes" in line for line in shuffled.caveats(False))
    assert any("another number of processes" in line for line in synced.caveats(False))
    assert synced.caveats(True) == []
    assert objective_of(V3).caveats(True) == []
    assert len(objective_of(V3).caveats(False)) == 1


# --- parts ---


@pytest.mark.parametrize(("size", "batches"), [(7, [3, 3, 3]), (4, [4, 9]), (5, [12]), (6, [2, 6])])
def test_the_queue_is_a_ring_of_any_size(size: int, batches: list[int]) -> None:
    queue = KeyQueue(size, 2)
    ring, place = [row.tolist() for row in queue.rows], 0
    for number, count in enumerate(batches):
        keys = torch.arange(2.0 * count).view(count, 2) + 100 * number
        queue.push(keys, LEFT_OUT)
        assert queue.rows.tolist() == ring
        assert queue.position == place
        queue.push(keys, TAKEN)
        for row in keys.tolist():
            ring[place] = row
            place = (place + 1) % size
        assert queue.rows.tolist() == ring
        assert queue.position == place


def test_the_queue_begins_with_the_seeds_unit_rows() -> None:
    one, same, other = (objective_of(v2(), seed=s).get_buffer("queue.rows") for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(20).double(), rtol=1e-6, atol=0)


def test_the_momentum_follows_the_papers_cosine() -> None:
    assert momentum_at(0.999, "constant", 7, 10) == 0.999
    assert momentum_at(0.99, "cosine", 0, 10) == pytest.approx(0.99)
    assert momentum_at(0.99, "cosine", 5, 10) == pytest.approx(0.995)
    assert momentum_at(0.99, "cosine", 10, 10) == momentum_at(0.99, "cosine", 11, 10) == 1.0


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--objective.queue 0: must be a number from 1"):
        MoCoConfig(queue=0)
    with pytest.raises(
        ConfigError, match=r"--objective.momentum 1.5: must be a number from 0 to 1"
    ):
        MoCoV3Config(momentum=1.5)
    with pytest.raises(ConfigError, match=r"--objective.temperature 0: must be a number above 0"):
        MoCoConfig(temperature=0)
    with pytest.raises(ConfigError, match=r"predictor\.out-dim is 256 and --head\.out-dim 6"):
        objective_of(MoCoV3Config())
