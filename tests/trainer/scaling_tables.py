"""What a step of SimCLR costs on 8 to 1,024 GPUs, by the planner's counts and stated rates.

``python -m tests.trainer.scaling_tables`` prints the tables of ``docs/scaling.md``: bytes by part
and link, strong scaling (the global batch stays) and weak scaling (a GPU's batch stays). Nothing in
them was measured. They are those of ``widebatch plan simclr-r50 --gpu h100-80g``, which also takes
other recipes, GPUs, links and batches.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.config import DataConfig, RunConfig
from trainer.planner.memory import memory
from trainer.planner.plan import images_of
from trainer.planner.rates import GPUS, Rates, stated_loader_rate
from trainer.planner.step_cost import StepCost, count_step
from trainer.planner.step_time import StepTime, step_time
from trainer.planner.traffic import Cluster, Flow, flows
from trainer.recipes.simclr import simclr_r50

__all__ = ["Point", "bytes_tables", "loss_table", "main", "point", "strong_table", "weak_table"]

WORLDS = (8, 32, 128, 512, 1024)
BATCHES = (4096, 16384, 65536)
WEAK = 64
"""Images of a GPU: 65,536 in all on 1,024."""
RATES = Rates(gpu=GPUS["h100-80g"])
_NODE = 8
_BYTES_AT = (8, 64, 1024)
_BYTES_BATCH = 4096
_GIB = 2**30


@dataclass(frozen=True)
class Point:
    """A step of a global batch on some GPUs."""

    batch: int
    world: int
    bytes: float
    """Of a GPU's memory at the peak."""
    fits: bool
    flows: tuple[Flow, ...]
    time: StepTime

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.batch / self.time.seconds

    def seconds(self, part: str) -> float:
        """Of the collectives whose name begins so."""
        return sum(flow.seconds for flow in self.flows if flow.part.startswith(part))

    @property
    def loss_seconds(self) -> float:
        """Of the loss's two gathers."""
        return self.seconds("embeddings") + self.seconds("log-sum-exps")


def _config(batch: int) -> RunConfig:
    data = DataConfig(train=(Path("ImageNet-1k"),))
    return dataclasses.replace(simclr_r50(), data=data, batch=batch, precision="bf16")


@cache
def _step_cost(local_batch: int) -> StepCost:
    """Of a GPU's step. Its memory has the loss's columns of two GPUs: 35 MB less than of 1,024."""
    return count_step(_config(2 * local_batch), 2)


@cache
def point(batch: int, world: int) -> Point:
    """Predict a step of ``simclr-r50``.

    Args:
        batch: global; a multiple of ``world``.
        world: GPUs, in nodes of eight.
    """
    config, step_cost = _config(batch), _step_cost(batch // world)
    cluster = Cluster(nodes=world // _NODE, gpus=_NODE, rates=RATES)
    needed = memory(step_cost, RATES, _NODE)
    found = flows(config, step_cost, cluster)
    images = images_of(config, known=False)
    loader_rate = stated_loader_rate(
        images.pixels, sum(group.pixels for group in config.view_plan())
    )
    time = step_time(config, step_cost, cluster, found, loader_rate)
    return Point(batch, world, needed.total, needed.fits, found, time)


def bytes_tables() -> str:
    """Markdown: what a step sends, by part, on one node and on more."""
    points = [point(_BYTES_BATCH, world) for world in _BYTES_AT]
    lines = [
        "| part | calls | " + " | ".join(f"{_where(p.world)}" for p in points) + " |",
        "|" + "---|" * (2 + len(points)),
    ]
    for parts in zip(*(p.flows for p in points)):
        first: Flow = parts[0]
        cells = [f"{_megabytes(flow)}, {1e3 * flow.seconds:.2f} ms" for flow in parts]
        beside = " (beside backward)" if first.overlapped else ""
        lines.append(f"| {first.part}{beside} | {first.collectives} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def loss_table() -> str:
    """Markdown: the loss's communication, and with a reduce-scatter or all-reduce in backward."""
    lines = [
        "| global batch | GPUs | rows | log-sum-exps | ours | + reduce-scatter | ours sends less by"
        " | + all-reduce | ours sends less by |",
        "|" + "---|" * 9,
    ]
    for batch in BATCHES:
        found = point(batch, 1024)
        sent = {flow.part: flow.network_bytes for flow in found.flows}
        rows, statistics = sent["embeddings"], sent["log-sum-exps"]
        ours, scattered, reduced = (
            rows + statistics,
            2 * rows,
            3 * rows,
        )  # gradients as wide as rows
        lines.append(
            f"| {batch:,} | {found.world:,} | {rows / 1e6:.2f} MB | {statistics / 1e6:.2f} MB |"
            f" {ours / 1e6:.2f} MB | {scattered / 1e6:.2f} MB | {1 - ours / scattered:.1%} |"
            f" {reduced / 1e6:.2f} MB | {1 - ours / reduced:.1%} |"
        )
    return "\n".join(lines)


def strong_table() -> str:
    """Markdown: global batches that stay as they are, on more and more GPUs."""
    return _table([[point(batch, world) for world in WORLDS] for batch in BATCHES])


def weak_table() -> str:
    """Markdown: as many images for each GPU, on more and more."""
    return _table([[point(WEAK * world, world) for world in WORLDS]])


def _table(series: list[list[Point]]) -> str:
    lines = [
        "| global batch | GPUs | a GPU's | step | compute | gradients | BatchNorm | loss |"
        " images/s | efficiency | bound by |",
        "|" + "---|" * 11,
    ]
    for points in series:
        # Compared with the fewest GPUs that hold it.
        base = next(each for each in points if each.fits)
        lines += [_row(each, base) for each in points]
    return "\n".join(lines)


def _row(each: Point, base: Point) -> str:
    head = f"| {each.batch:,} | {each.world:,} | {each.batch // each.world:,} |"
    if not each.fits:
        return f"{head} does not fit: {each.bytes / _GIB:.0f} GiB |" + " |" * 7
    efficiency = each.rate / each.world / (base.rate / base.world)
    parts = (
        each.time.seconds,
        each.time.compute,
        each.seconds("gradients"),
        each.seconds("BatchNorm"),
        each.loss_seconds,
    )
    cells = "".join(f" {1e3 * seconds:.2f} ms |" for seconds in parts)
    return f"{head}{cells} {each.rate:,.0f} | {efficiency:.0%} | {each.time.bottleneck} |"


def _where(world: int) -> str:
    return f"{world:,} GPUs, {'NVLink' if world <= _NODE else 'network'}"


def _megabytes(flow: Flow) -> str:
    sent = flow.network_bytes or flow.nvlink_bytes
    return f"{sent / 1e6:.3g} MB" if sent >= 1000 else f"{sent:.0f} B"


def main() -> None:
    """Print the tables."""
    print("\n\n".join((bytes_tables(), loss_table(), strong_table(), weak_table())))


if __name__ == "__main__":
    main()
