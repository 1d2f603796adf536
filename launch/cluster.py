"""Who am I: torchrun, ``--devices``, Slurm or one process.

Whatever started this process, the rest of the program reads torch's own variables (``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``GROUP_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). torchrun and ``--devices`` set them; under ``srun`` they are derived here from
Slurm's.
"""

import logging
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError

PORTS = range(20_000, 32_000)  # below 32,768, where Linux starts to hand out ports itself


@dataclass(frozen=True)
class Cluster:
    """This process's place among all processes of the run."""

    launcher: Literal["single", "torchrun", "slurm"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def variables(self) -> dict[str, str]:
        """torch's environment variables for this place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover(environ: Mapping[str, str]) -> Cluster:
    """Find this process's place from the environment that its launcher made.

    torchrun's variables win over Slurm's, for torchrun started by srun.

    Raises:
        ConfigError: a launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    # A batch script's shell has SLURM_PROCID too; only srun's tasks have a step.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    return Cluster("single")


def take_place(environ: MutableMapping[str, str] = os.environ) -> Cluster:
    """Find this process's place and write torch's variables for it; rank 0 speaks for all.

    Raises:
        ConfigError: as :func:`discover`.
    """
    place = discover(environ)
    if place.launcher != "single":
        environ.update(place.variables())
    if place.rank:
        logging.getLogger().setLevel(logging.WARNING)
    return place


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ConfigError(
                f"the environment has no {name}: start several processes with torchrun or srun"
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment's {name}={text!r} is not an integer") from None


def _from_torchrun(environ: Mapping[str, str]) -> Cluster:
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK={rank} is outside WORLD_SIZE={world_size}")
    return Cluster(
        "torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK", rank),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", world_size),
        node_rank=_integer(environ, "GROUP_RANK", 0),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_integer(environ, "MASTER_PORT", 29_500),
    )


def _from_slurm(environ: Mapping[str, str]) -> Cluster:
    job = _integer(environ, "SLURM_JOB_ID", 0)
    step = _integer(environ, "SLURM_STEP_ID")
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", _integer(environ, "SLURM_NTASKS", 1))
    address = environ.get("MASTER_ADDR") or _first_host(
        environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    )
    # Jobs that share a node must not share a port; every task of a step finds the same one.
    derived_port = PORTS[(job * 7 + step) % len(PORTS)]
    return Cluster(
        "slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID", 0),
        local_world_size=_tasks_here(environ, world_size),
        node_rank=_integer(environ, "SLURM_NODEID", 0),
        master_addr=address,
        master_port=_integer(environ, "MASTER_PORT", derived_port),
    )


def _tasks_here(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node from Slurm's compressed list, e.g. ``2(x3),1``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not text:
        return world_size
    counts: list[int] = []
    for part in text.split(","):
        number, _, repeat = part.partition("(x")
        counts += [int(number)] * (int(repeat.rstrip(")")) if repeat else 1)
    node = _integer(environ, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node} is outside the step's task list {text!r}")
    return counts[node]


def _first_host(node_list: str) -> str:
    """``gpu03`` of Slurm's compressed ``gpu[03-09,12],x1``."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", node_list).split(",")[0]
