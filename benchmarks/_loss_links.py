"""The losses of ``_gathering_losses`` over shaped links: bytes and times. Part of scaling.py."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from _gathering_losses import contenders
from _shaped_link import INTERFACE, ShapedNetwork, shaped_network

_WORKER = Path(__file__).with_name("_loss_on_a_rank.py")
OURS, WAITING, BASELINE = "widebatch", "widebatch, waiting", "gather, reduce-scatter"


@dataclass(frozen=True)
class Link:
    """What a cable is set to."""

    megabits: float
    delay_ms: float

    @classmethod
    def parse(cls, text: str) -> "Link":
        """``MEGABITS-MILLISECONDS``.

        Raises:
            ValueError: it is not that.
        """
        megabits, _, delay = text.partition("-")
        link = cls(float(megabits), float(delay or 0))
        if link.megabits < 0 or link.delay_ms < 0:
            raise ValueError(text)
        return link

    def __str__(self) -> str:
        rate = f"{self.megabits:g} Mbit/s" if self.megabits else "not shaped"
        return f"{rate}, {self.delay_ms:g} ms" if self.delay_ms else rate


@dataclass(frozen=True)
class Sent:
    """Bytes that a process sent in a step."""

    world: int
    contender: str
    counted: float
    """By the model, payload alone."""
    measured: float
    """At the interface, headers and acknowledgements included; the mean over processes."""


@dataclass
class Taken:
    """Seconds of a contender on a link; each the slowest process's."""

    world: int
    link: str
    rate: float
    """Bytes per second that a process reached."""
    contender: str
    steps: list[float] = field(default_factory=list)
    exchanges: list[float] = field(default_factory=list)


class Crew:
    """A process per rank, each in its namespace, which answer requests together."""

    def __init__(self, network: ShapedNetwork, folder: Path) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[IO[str]] = []
        for rank in range(network.world):
            place = {"rank": rank, "world": network.world, "interface": INTERFACE}
            place["store"] = str(folder / "store")
            self._logs.append((folder / f"{rank}.log").open("w+"))
            self._processes.append(
                subprocess.Popen(
                    network.inside(rank, [sys.executable, str(_WORKER), json.dumps(place)]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._logs[-1],
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the parent, which then ends them
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE},
                )
            )

    def ask(self, do: str, **request: Any) -> list[Any]:
        """Every rank's answer.

        Raises:
            RuntimeError: a rank ended; shows the end of what it printed.
        """
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # told below, with the reason
                assert process.stdin is not None
                process.stdin.write(json.dumps({"do": do, **request}) + "\n")
                process.stdin.flush()
        return [self._answer(rank) for rank in range(len(self._processes))]

    def _answer(self, rank: int) -> Any:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        if line:
            return json.loads(line)
        self._logs[rank].seek(0)
        raise RuntimeError(f"rank {rank} ended:\n{self._logs[rank].read()[-2000:]}")

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for log in self._logs:
            log.close()


@contextlib.contextmanager
def crew(world: int) -> Iterator[tuple[ShapedNetwork, Crew]]:
    """Raises LinkError where namespaces are not to be had."""
    with shaped_network(world) as network, tempfile.TemporaryDirectory() as folder:
        ranks = Crew(network, Path(folder))
        try:
            ranks.ask("check")
            yield network, ranks
        finally:
            ranks.end()


def count_bytes(world: int, rows: int, dim: int, steps: int) -> list[Sent]:
    """Over links that are not shaped.

    Args:
        world: processes.
        rows: of all processes together.
        dim: of a row.
        steps: to take the mean of.
    """
    share = rows // world
    found = []
    with crew(world) as (_, ranks):
        for name, contender in contenders().items():
            answers = ranks.ask("bytes", name=name, rows=share, dim=dim, steps=steps)
            counted = contender.bytes(share, dim, world)
            found.append(Sent(world, name, counted, statistics.mean(answers)))
    return found


def time_links(
    world: int, links: Sequence[Link], rows: int, dim: int, steps: int, rounds: int
) -> list[Taken]:
    """Every contender on every link; contenders take turns within a round.

    Args:
        world: processes.
        links: settings, one after the other.
        rows: of all processes together.
        dim: of a row.
        steps: of a contender in a round.
        rounds: of all contenders.
    """
    found: list[Taken] = []
    with crew(world) as (network, ranks):
        for link in links:
            network.shape(link.megabits, link.delay_ms)
            rate = statistics.median(ranks.ask("link"))
            shown = str(link if network.delays else Link(link.megabits, 0.0))
            taken = {name: Taken(world, shown, rate, name) for name in contenders()}
            for _ in range(rounds):
                for name, row in taken.items():
                    request = {"name": name, "rows": rows // world, "dim": dim, "steps": steps}
                    answers = ranks.ask("seconds", **request)
                    row.steps += map(max, zip(*(each["step"] for each in answers)))
                    row.exchanges += map(max, zip(*(each["exchange"] for each in answers)))
            found += taken.values()
    return found


def bytes_table(found: Sequence[Sent]) -> str:
    """Markdown: what each process sends, and how much less than the baseline ours is."""
    lines = [
        "| processes | loss | counted | measured | measured / counted | ours sends less by |",
        "|---|---|---|---|---|---|",
    ]
    ours = {row.world: row.measured for row in found if row.contender == OURS}
    for row in found:
        saving = (
            "" if row.contender in (OURS, WAITING) else f"{1 - ours[row.world] / row.measured:.1%}"
        )
        lines.append(
            f"| {row.world} | {row.contender} | {row.counted / 1e3:,.1f} kB |"
            f" {row.measured / 1e3:,.1f} kB | {row.measured / row.counted:.3f} | {saving} |"
        )
    return "\n".join(lines)


def times_table(found: Sequence[Taken]) -> str:
    """Markdown: medians, a row for each contender on each link."""
    lines = [
        "| processes | link | reached | loss | collectives alone | forward + backward | x ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        ours = next(
            o for o in found if (o.world, o.link, o.contender) == (row.world, row.link, OURS)
        )
        step = statistics.median(row.steps)
        lines.append(
            f"| {row.world} | {row.link} | {row.rate * 8 / 1e6:,.0f} Mbit/s | {row.contender} |"
            f" {1e3 * statistics.median(row.exchanges):.1f} ms | {1e3 * step:.1f} ms |"
            f" {step / statistics.median(ours.steps):.2f} |"
        )
    return "\n".join(lines)


def as_json(found: Sequence[Sent | Taken]) -> list[dict[str, Any]]:
    return [asdict(row) for row in found]
