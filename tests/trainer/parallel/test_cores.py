"""The processes of a run divide their machine: each decodes with its share of the cores."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from common import cores
from common.cores import Cores
from data_pipeline.crops import CropConfig
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import ViewPlan
from launch import command_line
from tests.dist import run_ranks
from trainer.doctor import environment
from trainer.parallel.machine import settle_threads

CPU = torch.device("cpu")


def _settled(rank: int, world_size: int, sets: list[list[int]]) -> dict[str, Any]:
    mine = Cores("here", sets[rank], {"pod": 6.0} if rank == 3 else {})
    for module in ("common.cores", "trainer.parallel.machine", "trainer.doctor.environment"):
        pytest.MonkeyPatch().setattr(f"{module}.own_cores", lambda: mine)
    os.environ.pop("OMP_NUM_THREADS")
    torch.set_num_threads(len(mine.cpus))  # as torch does by itself
    return {
        "threads": settle_threads(LoaderConfig(), CPU).workers,
        "beside a gpu": settle_threads(LoaderConfig(), torch.device("cuda")).workers,
        "asked for": settle_threads(LoaderConfig(workers=7), CPU).workers,
        "torch": torch.get_num_threads(),
        "doctor": next(iter(environment.cores(CPU))).said,
    }


def test_processes_that_overlap_divide_what_they_share() -> None:
    """Two are bound to four CPUs each; two may run on the same eight, one of them by a quota."""
    sets = [[0, 1, 2, 3], [4, 5, 6, 7], *[list(range(8, 16))] * 2]
    found = run_ranks(_settled, 4, sets, timeout=180)
    assert [each["threads"] for each in found] == [4, 4, 4, 4]
    assert [each["beside a gpu"] for each in found] == [2, 2, 2, 2]
    assert [each["asked for"] for each in found] == [7, 7, 7, 7]
    assert [each["torch"] for each in found] == [4, 4, 4, 4]
    said = (
        f"4 for this process, which may run on {{}} of {os.cpu_count()} CPUs{{}}; 4 decode images"
    )
    assert found[0]["doctor"] == said.format(4, "")
    assert found[3]["doctor"] == said.format(8, ", a quota of 6")


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.parallel.machine.own_cores", lambda: Cores("here", [0, 1, 2], {}))


@pytest.mark.usefixtures("three_cores")
def test_every_loader_of_a_run_has_the_share_and_its_settings_stay_as_given(tmp_path: Path) -> None:
    # Fabric takes seconds: not in the ranks of the test above.
    from tests.trainer.runs import pack_images
    from tests.trainer.tiny import tiny_config
    from trainer.config import DataConfig
    from trainer.prepare import prepare

    data = pack_images(tmp_path, count=24)
    loader = LoaderConfig(backend="torchvision")
    config = tiny_config(data, tmp_path / "run", loader=loader)
    config = dataclasses.replace(config, data=DataConfig(train=(data,), test=(data,)))
    with prepare(config) as run:
        assert run.loader.config.workers == 3
        assert run.knn is not None
        assert run.knn._train.config.workers == run.knn._test.config.workers == 3
        assert run.config.loader == loader


@pytest.mark.usefixtures("three_cores")
def test_every_loader_of_an_evaluation_has_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.trainer.runs import pack_images
    from trainer.evaluation import job
    from trainer.evaluation.load_encoder import LoadedEncoder, Preprocessing

    data = pack_images(tmp_path, count=24)
    encoder = LoadedEncoder(torch.nn.Flatten(), Preprocessing(size=8, resize=8), {})
    loader = LoaderConfig(backend="torchvision")
    crop = CropConfig(size=8)
    given: list[LoaderConfig] = []

    def spy(data: OpenData, views: ViewPlan, config: LoaderConfig, **more: Any) -> TrainLoader:
        given.append(config)
        return TrainLoader(data, views, config, **more)

    monkeypatch.setattr(job, "TrainLoader", spy)
    config = job.JobConfig(source="", loader=loader, device="cpu")
    with job.Job(config, encoder) as opened:
        assert opened.loader.workers == 3
        with opened.augmented(OpenData(data), crop, 8):
            assert [each.workers for each in given] == [3]


@pytest.mark.parametrize(
    ("given", "set_to"), [({}, "2"), ({"OMP_NUM_THREADS": "5"}, "5")], ids=["default", "as asked"]
)
def test_the_command_line_tells_torch_of_a_containers_quota(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], set_to: str
) -> None:
    for module in (cores, command_line):
        monkeypatch.setattr(module, "own_cores", lambda: Cores("here", range(64), {"pod": 2.5}))
    command_line._obey_quota(given)
    assert given == {"OMP_NUM_THREADS": set_to}


def test_without_a_quota_torch_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cores, command_line):
        monkeypatch.setattr(module, "own_cores", lambda: Cores("here", range(64), {}))
    environ: dict[str, str] = {}
    command_line._obey_quota(environ)
    assert environ == {}
