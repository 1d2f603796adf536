"""All checks, in order, on all ranks."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from common.rendezvous import shutdown
from trainer.config import DataConfig
from trainer.doctor import data, environment, folder, network, proof
from trainer.doctor.finding import Check, Finding, examined, of_all_ranks
from trainer.parallel.strategy import launch_fabric
from trainer.recipes import RECIPES


def examine(
    recipe: str, files: Sequence[Path], out: Path, node: int, join_timeout: float
) -> Iterator[tuple[Finding, list[int]]]:
    """Join the process group and make every check. A collective, to its end.

    Args:
        recipe: whose network the loader must keep up with.
        files: .beton files to examine; none leaves data and loader out.
        out: folder that runs will be written to.
        node: number of this process's node.
        join_timeout: seconds to wait for the other processes; 0: for ever.

    Yields:
        Every finding as it is found, with the ranks that made it; equal on all ranks.
    """
    fabric = launch_fabric("auto", "fp32", join_timeout=join_timeout)
    device = fabric.device
    checks: list[tuple[str, Check]] = [
        ("packages", environment.versions),
        ("ffcv", environment.ffcv),
        ("device", environment.device),
        ("cores", partial(environment.cores, device)),
        ("bandwidth", partial(network.bandwidth, device, node)),
        ("clocks", partial(network.clocks, device)),
        ("folder", partial(folder.shared_folder, out)),
        ("equal runs", partial(proof.equal_runs, device)),
    ]
    checks += [("data", partial(data.data_file, file)) for file in files]
    if files:
        config = dataclasses.replace(RECIPES[recipe](), data=DataConfig(train=tuple(files)))
        checks.append(("loader", partial(data.keeps_up, config, device)))
    try:
        for name, check in checks:
            yield from of_all_ranks(examined(name, check))
    finally:
        shutdown(torch.nn.Identity())
