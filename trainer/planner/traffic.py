"""What processes send each other in a step, by part and link, and how long that takes.

Collectives are counted as rings: of S bytes each, an all-reduce over W processes sends
``2 S (W-1)/W`` from every process, an all-gather ``S (W-1)``, an all-to-all ``S (W-1)/W``. A ring
passes through every node once: a node's network carries what one process sends. All-to-all is no
ring: a node sends what all its processes have for other nodes. Time is that of the slower link,
and the latency of each collective.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.objectives.cost import LossCost
from trainer.planner.loss_cost import loss_costs
from trainer.planner.rates import Rates
from trainer.planner.step_cost import StepCost

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


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of one kind, and what joins them."""

    nodes: int
    gpus: int
    """Processes of each node; where the device is the CPU they share its cores."""
    rates: Rates

    @property
    def world_size(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.gpus

    def all_reduce(self, part: str, size: float, calls: int, overlapped: bool = False) -> Flow:
        """The flow of ``calls`` all-reduces of ``size`` bytes together."""
        sent = 2 * size * (self.world_size - 1) / self.world_size
        return self._flow(part, sent, sent, calls, overlapped)

    def scatter(self, part: str, size: float, calls: int, overlapped: bool = False) -> Flow:
        """Of reduce-scatters of ``size`` bytes, or of all-gathers that make so many."""
        sent = size * (self.world_size - 1) / self.world_size
        return self._flow(part, sent, sent, calls, overlapped)

    def all_gather(self, part: str, size: float, calls: int) -> Flow:
        """Of all-gathers of ``size`` bytes from each process."""
        sent = size * (self.world_size - 1)
        return self._flow(part, sent, sent, calls)

    def all_to_all(self, part: str, size: float, calls: int) -> Flow:
        """Of all-to-alls of ``size`` bytes from each process."""
        inside = size * (self.gpus - 1) / self.world_size
        outside = size * (self.world_size - self.gpus) / self.world_size * self.gpus
        return self._flow(part, inside, outside, calls)

    def _flow(
        self, part: str, inside: float, outside: float, calls: int, overlapped: bool = False
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
            collectives=calls,
            seconds=max(nvlink, network) + (latency * calls if self.world_size > 1 else 0.0),
            overlapped=overlapped,
        )


def flows(config: RunConfig, step_cost: StepCost, cluster: Cluster) -> tuple[Flow, ...]:
    """All flows of a step of one process that costs ``step_cost``; none on one process."""
    if cluster.world_size == 1:
        return ()
    local_batch = config.batch // cluster.world_size
    found = [
        *_gradient_flows(config, step_cost, cluster),
        *_norm_flows(config, step_cost, cluster),
    ]
    for loss in loss_costs(config, local_batch, cluster.world_size, step_cost.num_samples):
        found += _loss_flows(config, loss, local_batch, cluster)
    found.append(cluster.all_reduce("agreed flags", 8, 1))
    return tuple(found)


def _loss_flows(
    config: RunConfig, loss: LossCost, local_batch: int, cluster: Cluster
) -> Iterator[Flow]:
    rows, item = loss.times * loss.rows, 2 if config.precision == "bf16" else _FLOAT
    if loss.gathers:
        yield cluster.all_gather("embeddings", rows * loss.dim * item, loss.times)
        yield cluster.all_gather("log-sum-exps", rows * loss.statistics * _FLOAT, loss.times)
    if loss.reduced:
        size = float(loss.times * loss.reduced * (8 if config.precision == "fp64" else _FLOAT))
        yield cluster.all_reduce("correlations", size, loss.times)
    if loss.exchanged:  # images on their way to the key encoder, and keys on their way back
        size = float(local_batch * item * loss.exchanged)
        yield cluster.all_to_all("shuffled keys", size, 2)


def _gradient_flows(config: RunConfig, step_cost: StepCost, cluster: Cluster) -> list[Flow]:
    item = 8 if config.precision == "fp64" else _FLOAT
    weights = step_cost.trainable * item
    size = step_cost.trainable * (2 if config.strategy.compress_gradients == "bf16" else item)
    calls = -(-weights // _BUCKET)
    if config.strategy.name == "ddp":
        return [cluster.all_reduce("gradients", size, calls, overlapped=True)]
    reduced = cluster.scatter("gradients", size, calls, overlapped=True)
    if config.strategy.name == "fsdp":  # gathered for the forward and the backward pass
        return [reduced, cluster.scatter("weights", 2 * weights, 2 * calls, overlapped=True)]
    return [reduced, cluster.scatter("weights", weights, calls)]


def _norm_flows(config: RunConfig, step_cost: StepCost, cluster: Cluster) -> list[Flow]:
    layers = [norm for norm in step_cost.norms if norm.synchronised]
    group = config.batch_norm_group or cluster.world_size
    if not layers or group == 1:
        return []
    # Groups are of consecutive ranks: those of a node come first.
    inside = min(group, cluster.gpus)
    ring = Cluster(nodes=max(1, group // inside), gpus=inside, rates=cluster.rates)
    item = 8 if cluster.rates.device == "cpu" else _FLOAT
    forward = sum(2 * each.channels + 1 for each in layers) * item
    backward = [each for each in layers if each.backward]
    sums = sum(2 * each.channels for each in backward) * item
    return [
        ring.all_gather("BatchNorm, forward", forward, len(layers)),
        ring.all_reduce("BatchNorm, backward", sums, len(backward)),
    ]
