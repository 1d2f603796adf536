"""The share of the cores: what a process may run on and use, divided by whom it shares with."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from common import cores
from common.cores import Cores, cores_alone, decoding_threads, share_of_cores
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.pool import LoaderConfig
from tests.data_pipeline.batches import open_train

NODE = range(96)
NONE: dict[str, float] = {}


def process(cpus: Iterable[int], quotas: Mapping[str, float] = NONE, machine: str = "a") -> Cores:
    return Cores(machine, list(cpus), quotas)


def bound(tasks: int, cpus: int) -> list[Cores]:
    return [process(range(task * cpus, (task + 1) * cpus)) for task in range(tasks)]


SHARES = {
    "one process": ([process(NODE)], [96]),
    "8 tasks that Slurm bound to 12 CPUs each": (bound(8, 12), [12] * 8),
    "8 tasks that nobody bound": ([process(NODE)] * 8, [12] * 8),
    "torchrun --numa-binding node": ([process(range(48)), process(range(48, 96))] * 4, [12] * 8),
    "a task of one CPU": (bound(8, 1), [1] * 8),
    "more processes than CPUs": ([process(range(2))] * 5, [1] * 5),
    "three thirds are a whole": ([process(range(6))] * 3, [2] * 3),
    "sets that overlap in part": ([process(range(8)), process(range(4, 12))], [6, 6]),
    "a set within another": ([process(range(8)), process(range(6, 8))], [7, 1]),
    "nodes of another machine": ([process(NODE), process(NODE, machine="b")], [96, 96]),
    "a quota of one core": ([process(range(2), {"pod": 1.0})], [1]),
    "less than one core": ([process(range(2), {"pod": 0.5})], [1]),
    "a broken quota": ([process(NODE, {"pod": 7.5})], [7]),
    "a quota of more than the CPUs": ([process(range(4), {"pod": 9.0})], [4]),
    "a quota that 4 share": ([process(NODE, {"pod": 32.0})] * 4, [8] * 4),
    "a container each": ([process(NODE, {str(i): 6.0}) for i in range(4)], [6] * 4),
    "a quota around theirs": (
        [process(NODE, {str(i): 6.0, "all": 16.0}) for i in range(4)],
        [4] * 4,
    ),
}


@pytest.mark.parametrize(("everyone", "shares"), SHARES.values(), ids=SHARES.keys())
def test_the_share_is_what_nobody_else_of_the_machine_has(
    everyone: list[Cores], shares: list[int]
) -> None:
    assert [share_of_cores(mine, everyone) for mine in everyone] == shares


@pytest.mark.parametrize(
    ("share", "beside_gpu", "threads"),
    [(12, False, 12), (12, True, 10), (3, True, 1), (1, True, 1)],
)
def test_two_cores_of_a_gpu_decode_nothing(share: int, beside_gpu: bool, threads: int) -> None:
    assert decoding_threads(share, beside_gpu) == threads


# ---- what the system says ----

V2 = "30 24 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def system(root: Path, groups: str, mounts: Iterable[str], files: Mapping[str, str]) -> Path:
    """A folder that looks like ``/`` to a process in ``groups``."""
    written = {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join(mounts)}
    for name, text in {**written, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V1_FILES = {"cpu/pod/cpu.cfs_quota_us": "150000", "cpu/pod/cpu.cfs_period_us": "100000"}
V1_FREE = {"cpu/pod/x/cpu.cfs_quota_us": "-1", "cpu/pod/x/cpu.cfs_period_us": "100000"}
SYSTEMS = {
    "version 2": ("0::/pod", [V2], {"pod/cpu.max": "100000 100000"}, [1.0]),
    "no limit": ("0::/pod", [V2], {"pod/cpu.max": "max 100000"}, []),
    "the groups around it": (
        "0::/pod/job/step",
        [V2],
        {"pod/job/step/cpu.max": "max 100000", "pod/job/cpu.max": "4 1", "pod/cpu.max": "5 2"},
        [4.0, 2.5],
    ),
    "a container's own view": ("0::/", [V2], {"cpu.max": "300000 100000"}, [3.0]),
    "a container in the host's view": (
        "0::/docker/5f",
        [V2.replace("{top}", "/docker/5f")],
        {"cpu.max": "300000 100000"},
        [3.0],
    ),
    "a path outside of the view": ("0::/../other", [V2], {"cpu.max": "200000 100000"}, [2.0]),
    "version 1": (
        "4:memory:/pod\n3:cpu,cpuacct:/pod/x\n0::/",
        [V1_MEMORY, V1],
        {**V1_FILES, **V1_FREE},
        [1.5],
    ),
    "version 1 without limit": ("3:cpu:/pod/x", [V1], V1_FREE, []),
    "both, of which 1 has the processors": (
        "3:cpu:/pod\n0::/pod",
        [V1, V2.replace("cgroup rw - ", "cgroup/unified rw - ")],
        {**V1_FILES, "unified/pod/cpu.stat": ""},
        [1.5],
    ),
}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "limits"), SYSTEMS.values(), ids=SYSTEMS.keys()
)
def test_quotas_are_read_from_the_process_s_groups_and_those_around_them(
    tmp_path: Path, groups: str, mounts: list[str], files: dict[str, str], limits: list[float]
) -> None:
    root = system(tmp_path, groups, [mount.replace("{top}", "/") for mount in mounts], files)
    assert list(cores._quotas(root).values()) == limits


def test_where_there_are_no_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cores._quotas(tmp_path) == {}


# ---- who asks ----


@pytest.fixture
def two_and_a_half_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "own_cores", lambda: process(NODE, {"pod": 2.5}))


@pytest.mark.usefixtures("two_and_a_half_cores")
def test_a_quota_bounds_the_loader_and_packing(
    jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cores_alone() == 2
    source = open_train(jpegs, workers=0)
    source.close()
    assert source.config.workers == 2
    assert LoaderConfig().workers == 0

    asked: list[int] = []
    monkeypatch.setattr(
        "data_pipeline.packing.pack._WORTH_A_PROCESS", 1
    )  # a process for an image, if cores allow
    monkeypatch.setattr(
        "data_pipeline.packing.pack.encode_in_order",
        lambda chunks, codec, workers: asked.append(workers) or [],
    )
    with pytest.raises(Exception):  # noqa: B017 - nothing was encoded
        pack(str(jpegs.parent / "images"), tmp_path / "x.beton", PackConfig(), progress=False)
    assert asked == [2]
