"""What lies between processes: bandwidth of every pair of nodes, clocks."""

import itertools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from common.collectives import gather_rows, rank_and_size
from trainer.doctor.finding import Finding, judged

_BYTES = 16 * 2**20
_ROUNDS = 4
_MOST_PAIRS = 400  # 29 nodes; beyond, neighbours only
_CLOCK_NOTE_S, _CLOCK_BAD_S = 0.5, 30.0


def bandwidth(device: torch.device, node: int) -> Iterator[Finding]:
    """Every pair of nodes, one pair at a time, by the backend that training uses. A collective.

    On one node the pairs are of its processes.
    """
    rank, size = rank_and_size()
    if size == 1:
        return
    nodes = gather_rows(torch.tensor([node], device=device)).tolist()
    first_ranks = [nodes.index(n) for n in sorted(set(nodes))]
    ends = first_ranks if len(first_ranks) > 1 else list(range(size))
    pairs = list(itertools.combinations(ends, 2))
    if len(pairs) > _MOST_PAIRS:
        pairs = list(itertools.pairwise(ends))
    rates = torch.zeros(len(pairs), device=device, dtype=torch.float64)
    for index, pair in enumerate(pairs):
        dist.barrier()
        if rank in pair:
            rates[index] = _rate(rank, pair, device)
    dist.all_reduce(rates, dist.ReduceOp.MAX)
    by_rate = sorted(zip(rates.tolist(), pairs))
    slowest, median = by_rate[0], by_rate[len(by_rate) // 2]
    said = (
        f"{dist.get_backend()}, {len(pairs)} pair(s): median {median[0] / 1e9:.2f} GB/s, slowest "
        f"{slowest[0] / 1e9:.2f} GB/s (ranks {slowest[1][0]} and {slowest[1][1]})"
    )
    yield judged(
        "bandwidth",
        slowest[0] >= 0.5 * median[0],
        said,
        "bad",
        "one link is less than half as fast as the others: look at that node's cable, port and "
        "NCCL_SOCKET_IFNAME / NCCL_IB_HCA, or leave it out (sbatch --exclude)",
    )


def _rate(rank: int, pair: tuple[int, int], device: torch.device) -> float:
    """Bytes per second from the first of the pair to the second and back."""
    message = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    start = 0.0
    for round_ in range(_ROUNDS + 1):  # the first connects
        if round_ == 1:
            start = time.perf_counter()
        if rank == pair[0]:
            dist.send(message, pair[1])
            dist.recv(message, pair[1])
        else:
            dist.recv(message, pair[0])
            dist.send(message, pair[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2 * _ROUNDS * _BYTES / (time.perf_counter() - start)


def clocks(device: torch.device) -> Iterator[Finding]:
    """Wall clocks, compared right after barriers: the least spread of ten. A collective."""
    if rank_and_size()[1] == 1:
        return
    spreads = []
    for _ in range(10):
        dist.barrier()
        mine = torch.tensor([time.time()], device=device, dtype=torch.float64)
        times = gather_rows(mine)
        spreads.append(float(times.max() - times.min()))
    spread = min(spreads)
    yield judged(
        "clocks",
        spread < _CLOCK_NOTE_S,
        f"within {1e3 * spread:.1f} ms of each other",
        "bad" if spread > _CLOCK_BAD_S else "note",
        "run chrony or NTP on every node",
    )
