"""One process of scaling.py's comparison of losses, started in a network of its own.

Its first argument is JSON: ``rank``, ``world``, ``store`` (a file that all processes see),
``interface``. Then it reads a request per line from standard input and prints an answer per line,
both JSON. All processes get the same requests.
"""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _gathering_losses import check_equal, contenders, gradient

PROBE = 2**23  # bytes, to find a link's rate


class Rank:
    """Answers requests; every method but the constructor is a collective."""

    def __init__(self, rank: int, world: int, interface: str) -> None:
        self.rank, self.world = rank, world
        self.sent = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
        self.found = contenders()

    def check(self) -> list[str]:
        """Names of the contenders, once they are shown to be equal."""
        check_equal(self.found)
        return list(self.found)

    def link(self) -> float:
        """Bytes per second from each process to the next, all at once."""
        out, into = torch.zeros(PROBE // 4), torch.empty(PROBE // 4)
        rates = []
        for _ in range(3):
            dist.barrier()
            start = time.perf_counter()
            work = dist.isend(out, (self.rank + 1) % self.world)
            dist.recv(into, (self.rank - 1) % self.world)
            assert work is not None
            work.wait()
            rates.append(PROBE / (time.perf_counter() - start))
        return statistics.median(rates)

    def bytes(self, name: str, rows: int, dim: int, steps: int) -> float:
        """Bytes that left the interface in a step, those of as many bare barriers taken off."""
        z_VBD, contender = self._projections(rows, dim), self.found[name]
        gradient(contender, z_VBD)
        idle = self._counted(lambda: None, steps)
        return (self._counted(lambda: gradient(contender, z_VBD), steps) - idle) / steps

    def seconds(self, name: str, rows: int, dim: int, steps: int) -> dict[str, list[float]]:
        """Of whole steps, forward and backward, and of their collectives alone."""
        z_VBD, contender = self._projections(rows, dim), self.found[name]
        unit_MD = z_VBD.flatten(0, 1)
        gradient(contender, z_VBD)
        return {
            "step": [self._timed(lambda: gradient(contender, z_VBD)) for _ in range(steps)],
            "exchange": [self._timed(lambda: contender.exchange(unit_MD)) for _ in range(steps)],
        }

    def _projections(self, rows: int, dim: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rank)
        return torch.randn(2, rows // 2, dim, generator=generator)

    def _counted(self, work: Callable[[], Any], steps: int) -> int:
        self._settle()
        before = int(self.sent.read_text())
        for _ in range(steps):
            dist.barrier()
            work()
        self._settle()
        return int(self.sent.read_text()) - before

    def _settle(self) -> None:
        """Let the last acknowledgements leave."""
        dist.barrier()
        time.sleep(0.1)

    def _timed(self, work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def main() -> None:
    place = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place['store']}",
        rank=place["rank"],
        world_size=place["world"],
        timeout=datetime.timedelta(seconds=120),
    )
    rank = Rank(place["rank"], place["world"], place["interface"])
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(rank, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
