"""Processes that each have a network of their own, joined by links of a chosen rate and delay.

Linux network namespaces, one for each process and one for the switch that joins them; nothing of it
is seen or changed outside them. Needs root and iproute2. Part of scaling.py.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

INTERFACE = "link0"
PREFIX = "wbscaling"
_BURST = 2**17  # bytes that may pass at once: two of the kernel's largest segments
_QUEUE = 2**20  # bytes that may wait


class LinkError(Exception):
    """Such a network cannot be made here; the message says what to do."""


@contextlib.contextmanager
def shaped_network(world: int) -> Iterator["ShapedNetwork"]:
    """``world`` namespaces on one switch; all is gone afterwards, whatever happens.

    Raises:
        LinkError: not root, no iproute2, or a container that may not.
    """
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LinkError(f"shaped links need `{tool}`: install iproute2")
    if os.geteuid() != 0:
        raise LinkError("shaped links need root: run it with sudo, or give --parts steps")
    _remove_left_behind()
    network = ShapedNetwork(world)
    try:
        network.make()
        yield network
    finally:
        network.remove()


class ShapedNetwork:
    """Made by :func:`shaped_network`.

    Attributes:
        delays: whether the kernel can delay packets (its module sch_netem).
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.delays = False
        self._switch = f"{PREFIX}{os.getpid()}s"
        self._spaces = [f"{PREFIX}{os.getpid()}r{rank}" for rank in range(world)]

    def make(self) -> None:
        """Namespaces, a bridge, and a cable from each to it."""
        switch = self._switch
        for space in (switch, *self._spaces):
            _run("ip", "netns", "add", space)
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for rank, space in enumerate(self._spaces):
            port = f"port{rank}"
            cable = ("type", "veth", "peer", "name", INTERFACE, "netns", space)
            _run("ip", "-n", switch, "link", "add", port, *cable)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge0", "up")
            # No IPv6: its announcements would be counted.
            _run("ip", "-n", space, "link", "set", INTERFACE, "addrgenmode", "none", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            # 198.18.0.0/15 is set aside for test networks (RFC 2544).
            _run("ip", "-n", space, "addr", "add", f"198.18.0.{rank + 1}/24", "dev", INTERFACE)
        self.delays = self._may_delay()

    def _may_delay(self) -> bool:
        try:
            self._discipline(self._switch, "bridge0", "root", "netem", "delay", "1ms")
        except LinkError:
            return False
        _run("tc", "-n", self._switch, "qdisc", "del", "dev", "bridge0", "root")
        return True

    def shape(self, megabits: float, delay_ms: float) -> None:
        """Give every cable, each way, a rate, and half of the delay from process to process.

        Args:
            megabits: per second; 0: as fast as the machine.
            delay_ms: one way; left out where ``delays`` is false.
        """
        ends = [(space, INTERFACE) for space in self._spaces]
        ends += [(self._switch, f"port{rank}") for rank in range(self.world)]
        for space, device in ends:
            with contextlib.suppress(LinkError):  # there is none at first
                _run("tc", "-n", space, "qdisc", "del", "dev", device, "root")
            parent = ["root"]
            if delay_ms and self.delays:
                delay = ("netem", "delay", f"{500 * delay_ms:.0f}us", "limit", "100000")
                self._discipline(space, device, *parent, "handle", "1:", *delay)
                parent = ["parent", "1:1"]
            if megabits:
                rate = ("tbf", "rate", f"{megabits}mbit", "burst", str(_BURST))
                self._discipline(space, device, *parent, *rate, "limit", str(_QUEUE))

    @staticmethod
    def _discipline(space: str, device: str, *words: str) -> None:
        _run("tc", "-n", space, "qdisc", "add", "dev", device, *words)

    def inside(self, rank: int, command: Sequence[str]) -> list[str]:
        """The command, as a process of that rank."""
        return ["ip", "netns", "exec", self._spaces[rank], *command]

    def remove(self) -> None:
        """Delete the namespaces, and with them all that is in them."""
        for space in (*self._spaces, self._switch):
            _delete(space)


def _delete(space: str) -> None:
    with contextlib.suppress(LinkError):  # never made, or gone already
        _run("ip", "netns", "del", space)


def _remove_left_behind() -> None:
    """Namespaces of a process that was killed before it could clean up."""
    for name in _run("ip", "netns", "list").split():
        number = name.removeprefix(PREFIX).rstrip("s").split("r")[0]
        if name.startswith(PREFIX) and number.isdigit() and not Path(f"/proc/{number}").exists():
            _delete(name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}; shaped links need root and"
            " network namespaces (in a container: --privileged)"
        )
    return done.stdout
