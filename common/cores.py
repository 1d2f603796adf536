"""How many cores a process may keep busy: the rule, and what the system says of this process.

The CPUs of a set are shared among the processes of the machine that may run on them, and so is
what a container's quota allows. Where Slurm or torchrun has bound each process to CPUs of its own,
they are its share, whole; where all processes may run anywhere, they divide the machine.
"""

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

_GPU_RESERVE = 2  # cores that the main thread, autograd's and NCCL's keep busy beside a GPU


@dataclass(frozen=True)
class Cores:
    """What the system lets one process use."""

    machine: str
    """Processes with the same one share CPUs of the same number."""
    cpus: Sequence[int]
    """Those that it may run on."""
    quotas: Mapping[str, float]
    """Cores that each limited control group which it is in may keep busy, by the group."""


def share_of_cores(mine: Cores, everyone: Iterable[Cores]) -> int:
    """Cores for ``mine``, of a run of the processes ``everyone``, itself among them; at least 1."""
    local = [each for each in everyone if each.machine == mine.machine]
    on_cpu = Counter(cpu for each in local for cpu in each.cpus)
    in_group = Counter(group for each in local for group in each.quotas)
    of_cpus = sum(Fraction(1, on_cpu[cpu]) for cpu in mine.cpus)
    of_quotas = [cores / in_group[group] for group, cores in mine.quotas.items()]
    return max(1, int(min([of_cpus, *of_quotas])))


def decoding_threads(share: int, beside_gpu: bool) -> int:
    """Threads that decode images, of a process's share of the cores."""
    return max(1, share - _GPU_RESERVE) if beside_gpu else share


def own_cores() -> Cores:
    """What the system says of this process."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = affinity(0) if affinity else range(os.cpu_count() or 1)
    return Cores(_machine(), sorted(cpus), _quotas(Path("/")))


def cores_alone() -> int:
    """This process's share where no other of the run is on its machine."""
    mine = own_cores()
    return share_of_cores(mine, [mine])


def _machine() -> str:
    """Also from within containers, which have names of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _quotas(root: Path) -> dict[str, float]:
    """See :attr:`Cores.quotas`; a group is told by its inode, which is one in every container."""
    found = {}
    for group in _control_groups(root):
        cores = _quota(group)
        if cores is not None:
            status = group.stat()
            found[f"{status.st_dev}:{status.st_ino}"] = cores
    return found


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, and of those around them, as far as seen."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux
    paths: dict[str, str] = {}
    for group in groups:
        _, controllers, path = group.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for mount in mounts:
        where, _, what = mount.partition(" - ")
        top, folder = where.split()[3:5]
        kind, options = what.split()[0], what.split()[-1].split(",")
        if kind == "cgroup2":  # one hierarchy, which names no controller
            below = PurePosixPath(paths.get("", top))
        elif kind == "cgroup" and "cpu" in options:
            below = PurePosixPath(paths.get("cpu", top))
        else:
            continue
        # A path from outside of a container's own view: what is mounted is the container's group.
        outside = ".." in below.parts or not below.is_relative_to(top)
        below = PurePosixPath() if outside else below.relative_to(top)
        for part in (below, *below.parents):
            yield root / folder.lstrip("/") / part


def _quota(group: Path) -> float | None:
    """Cores that a group may keep busy; None: as many as there are."""
    with contextlib.suppress(OSError, ValueError):  # "max" of version 2 is no number
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
