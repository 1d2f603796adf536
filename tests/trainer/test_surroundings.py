"""What surrounds a run changes nothing of it; a batch that cannot be shared out starts nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.reading.pool import LoaderConfig
from tests.dist import RankFailure
from tests.trainer.runs import SMALL_ENCODER, assert_equal_runs, metrics, pack_images, train
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig, to_json

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, sys, time
from trainer.config import RunConfig, from_json
from trainer.loop import fit
print(time.time(), time.tzname[0], hash("a"))
print(fit(from_json(RunConfig, json.loads(sys.argv[1]))).value)
"""
USUAL = {"TZ": "UTC", "PYTHONHASHSEED": "1"}
FAKETIME = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


class Usual(NamedTuple):
    out: Path
    said: list[str]  # clock, time zone, hash of a text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=48)


def config(data: Path, out: Path, workers: int = 1) -> RunConfig:
    loader = LoaderConfig(backend="torchvision", workers=workers)
    return tiny_config(data, out, steps=4, encoder=SMALL_ENCODER, loader=loader)


def train_elsewhere(config: RunConfig, environment: dict[str, str]) -> list[str]:
    """Train in a process of its own; returns its clock, time zone and hash of a text."""
    command = [sys.executable, "-c", CHILD, json.dumps(to_json(config))]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    told, outcome = done.stdout.splitlines()
    assert outcome == "done"
    return told.split()


@pytest.fixture(scope="module")
def usual(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Usual:
    """A run in plain surroundings, which the others are compared with."""
    plain = config(data, tmp_path_factory.mktemp("usual") / "run")
    return Usual(plain.out, train_elsewhere(plain, USUAL))


@pytest.mark.reliability(21)
@pytest.mark.slow
def test_time_zone_hash_seed_and_workers_change_nothing(
    data: Path, usual: Usual, tmp_path: Path
) -> None:
    other = config(data, tmp_path / "other", workers=3)
    unusual = train_elsewhere(other, {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "99"})
    assert unusual[1] != usual.said[1] and unusual[2] != usual.said[2], "nothing differed"
    assert_equal_runs(usual.out, other.out)


@pytest.mark.reliability(21)
@pytest.mark.slow
@pytest.mark.skipif(
    not FAKETIME,
    reason="no clock can be set off here: apt-get install libfaketime (`make test` does)",
)
def test_a_clock_that_is_a_day_off_changes_nothing(
    data: Path, usual: Usual, tmp_path: Path
) -> None:
    other = config(data, tmp_path / "other")
    unusual = train_elsewhere(other, {**USUAL, "LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": "+1d"})
    assert float(unusual[0]) - float(usual.said[0]) > 80_000
    assert_equal_runs(usual.out, other.out)


@pytest.mark.reliability(12)
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    uneven = dataclasses.replace(config(data, tmp_path / "run"), batch=25)
    with pytest.raises(RankFailure) as failure:
        train(2, uneven)
    said = "--batch 25 does not divide by 2 processes; nearest that do: 24 and 26"
    assert str(failure.value).count(said) == 2, "every rank says it"
    assert not (tmp_path / "run").exists()
    for nearest in (24, 26):
        fitting = dataclasses.replace(uneven, batch=nearest, steps=1, out=tmp_path / f"{nearest}")
        assert train(2, fitting) == "done"
        assert len(metrics(fitting.out)) == 1
