"""The cores of a machine, divided among the processes of a run on it."""

import os
from dataclasses import asdict, replace

import torch

from common.collectives import all_gather_json
from common.cores import Cores, cores_alone, decoding_threads, own_cores, share_of_cores
from data_pipeline.reading.loader import LoaderConfig


def agreed_share() -> int:
    """Cores that this process may keep busy beside the others of its machine. A collective."""
    mine = own_cores()
    return share_of_cores(mine, [Cores(**each) for each in all_gather_json(asdict(mine))])


def settle_threads(loader: LoaderConfig, device: torch.device) -> LoaderConfig:
    """Give loaders, and torch's own operations, their threads. A collective.

    Args:
        loader: says how many threads decode, or leaves it to this process's share of the cores.
        device: of this process; beside a GPU two cores of the share decode nothing.

    Returns:
        ``loader`` with a number of threads. torch gets no more than the share, unless
        ``OMP_NUM_THREADS`` names another number than all that this process sees.
    """
    share = agreed_share()
    if os.environ.get("OMP_NUM_THREADS") in (None, "", str(cores_alone())):
        torch.set_num_threads(min(share, torch.get_num_threads()))
    workers = loader.workers or decoding_threads(share, device.type == "cuda")
    return replace(loader, workers=workers)
