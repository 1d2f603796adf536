"""What processes send each other in a step, by part and link, and how long that takes.

Collectives are counted as rings: of S bytes each, an all-reduce over W processes sends
``2 S (W-1)/W`` from every process, an all-gather ``S (W-1)``, an all-to-all ``S (W-1)/W``. A ring
passes through every node once: a node's network carries what one process sends. All-to-all is no
ring: a node sends what all its processes have for other nodes. Time is that of the slower link,
and the latency of each collective.
"""

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.objectives.base import Objective
from trainer.objectives.moco import MoCoConfig
from trainer.planner.loss_cost import contrast
from trainer.planner.rates import Rates
from trainer.planner.step_cost import StepCost, synchronised

_FLOAT = 4
_BUCKET = 25 * 2**20  # DDP's: bytes of gradients that travel together


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of collective in a step."""

    part: str
    nvlink_bytes: float
    """Sent by each process to others of its node."""
    network_bytes: float
    """Sent by each node over the network."""
    collectives: int
    """How many calls it takes."""
    seconds: float
    """By the rates, if nothing else went on."""
    overlapped: bool
    """Whether it runs beside the backward pass."""


def flows(
    config: RunConfig, step_cost: StepCost, local_batch: int, nodes: int, gpus: int, rates: Rates
) -> tuple[Flow, ...]:
    """All flows of a step; none on one process.

    Args:
        config: the run.
        step_cost: of one process's step.
        local_batch: images of a process.
        nodes: machines.
        gpus: processes on each.
        rates: of links.
    """
    world = nodes * gpus
    if world == 1:
        return ()
    ring = _Ring(nodes, gpus, rates)
    found = [
        *_gradient_flows(config, step_cost, ring),
        *_norm_flows(config, step_cost, nodes, gpus, rates),
        *_loss_flows(config, local_batch, world, ring),
    ]
    if isinstance(config.objective, MoCoConfig) and config.objective.key_batch_norm == "shuffle":
        found.append(ring.all_to_all("shuffled keys", _shuffled_bytes(config, local_batch), 2))
    found.append(ring.all_reduce("agreed flags", 8, 1))
    return tuple(found)


def _gradient_flows(config: RunConfig, step_cost: StepCost, ring: "_Ring") -> list[Flow]:
    item = 2 if config.strategy.compress_gradients == "bf16" else _gradient_item(config)
    size, weights = step_cost.trainable * item, step_cost.trainable * _gradient_item(config)
    calls = -(-weights // _BUCKET)
    if config.strategy.name == "ddp":
        return [ring.all_reduce("gradients", size, calls, overlapped=True)]
    reduced = ring.reduce_scatter("gradients", size, calls, overlapped=True)
    if config.strategy.name == "fsdp":  # gathered for the forward and the backward pass
        return [reduced, ring.spread("weights", 2 * weights, 2 * calls, overlapped=True)]
    return [reduced, ring.spread("weights", weights, calls)]


def _norm_flows(
    config: RunConfig, step_cost: StepCost, nodes: int, gpus: int, rates: Rates
) -> list[Flow]:
    layers = synchronised(config, step_cost.norms)
    group = config.batch_norm_group or nodes * gpus
    if not layers or group == 1:
        return []
    # Groups are of consecutive ranks: those of a node come first.
    inside = min(group, gpus)
    ring = _Ring(max(1, group // inside), inside, rates)
    item = 8 if rates.device == "cpu" else _FLOAT
    forward = sum(2 * each.channels + 1 for each in layers) * item
    backward = [each for each in layers if each.backward]
    sums = sum(2 * each.channels for each in backward) * item
    return [
        ring.all_gather("BatchNorm, forward", forward, len(layers)),
        ring.all_reduce("BatchNorm, backward", sums, len(backward)),
    ]


def _loss_flows(config: RunConfig, local_batch: int, world: int, ring: "_Ring") -> list[Flow]:
    loss = contrast(config, local_batch, world, "cuda")
    item = 2 if config.precision == "bf16" else _FLOAT
    embeddings = loss.gathered_rows * loss.dim * item
    statistics = loss.statistics_rows * loss.statistics_columns * _FLOAT
    return [
        ring.all_gather("embeddings", embeddings, loss.times),
        ring.all_gather("log-sum-exps", statistics, loss.times),
    ]


def _gradient_item(config: RunConfig) -> int:
    return 8 if config.precision == "fp64" else _FLOAT


def _shuffled_bytes(config: RunConfig, local_batch: int) -> float:
    """Images on their way to the key encoder, and keys on their way back."""
    item = 2 if config.precision == "bf16" else _FLOAT
    pixels = 3 * config.crop.size**2 * (Objective.views - 1)
    return float(local_batch * item * (pixels + config.head.out_dim))


@dataclass(frozen=True)
class _Ring:
    nodes: int
    gpus: int
    rates: Rates

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def all_reduce(
        self, part: str, size: float, collectives: int, overlapped: bool = False
    ) -> Flow:
        sent = 2 * size * (self.world - 1) / self.world
        return self._flow(part, sent, sent, collectives, overlapped)

    def reduce_scatter(
        self, part: str, size: float, collectives: int, overlapped: bool = False
    ) -> Flow:
        sent = size * (self.world - 1) / self.world
        return self._flow(part, sent, sent, collectives, overlapped)

    def spread(self, part: str, size: float, collectives: int, overlapped: bool = False) -> Flow:
        """An all-gather of ``size`` bytes in all."""
        return self.reduce_scatter(part, size, collectives, overlapped)

    def all_gather(self, part: str, size: float, collectives: int) -> Flow:
        sent = size * (self.world - 1)
        return self._flow(part, sent, sent, collectives, False)

    def all_to_all(self, part: str, size: float, collectives: int) -> Flow:
        inside = size * (self.gpus - 1) / self.world
        outside = size * (self.world - self.gpus) / self.world * self.gpus
        return self._flow(part, inside, outside, collectives, False)

    def _flow(
        self, part: str, inside: float, outside: float, collectives: int, overlapped: bool
    ) -> Flow:
        rates = self.rates
        inside = inside if self.gpus > 1 else 0.0
        outside = outside if self.nodes > 1 else 0.0
        nvlink = inside / (rates.gpu.nvlink * rates.nvlink_fraction)
        network = outside / (rates.link_bytes * rates.link_fraction)
        latency = rates.network_seconds if self.nodes > 1 else rates.node_seconds
        return Flow(
            part=part,
            nvlink_bytes=inside,
            network_bytes=outside,
            collectives=collectives,
            seconds=max(nvlink, network) + (latency * collectives if self.world > 1 else 0.0),
            overlapped=overlapped,
        )
