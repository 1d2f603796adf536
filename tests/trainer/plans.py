"""Plans of small runs on GPUs of any size; no file and no GPU is there."""

import dataclasses
from pathlib import Path
from typing import Any

from tests.trainer.runs import SMALL_ENCODER
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig
from trainer.planner.plan import Images, Plan, make_plan
from trainer.planner.rates import GPUS, Rates
from trainer.planner.traffic import Cluster

IMAGES = Images(count=100_000, pixels=64 * 64, bytes=2_500, source="test")
NOWHERE = Path("nowhere")
MIB = 2**20


def small(**changes: Any) -> RunConfig:
    """A run of the small encoder with a batch of 64."""
    return tiny_config(NOWHERE, NOWHERE, **{"encoder": SMALL_ENCODER, "batch": 64, **changes})


def rates(gpu: str = "h100-80g", **changes: Any) -> Rates:
    """The rates of a GPU of the list, by its name."""
    return Rates(gpu=GPUS[gpu], **changes)


def plan(config: RunConfig, nodes: int = 1, gpus: int = 8, **changes: Any) -> Plan:
    """``config`` planned on one node of eight H100s, unless told otherwise."""
    cluster = Cluster(nodes=nodes, gpus=gpus, rates=changes.pop("rates", rates()))
    return make_plan(config, cluster, IMAGES)


def tiny_gpu(mib: float) -> Rates:
    """An H100 with ``mib`` MiB of memory."""
    gpu = dataclasses.replace(GPUS["h100-80g"], memory=mib * MIB)
    return Rates(gpu=gpu, context_bytes=0.0)


def flow(found: Plan, part: str) -> Any:
    """What of ``part`` travels between processes."""
    return next(each for each in found.flows if each.part == part)
