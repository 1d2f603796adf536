"""A run whose numbers are lost ends with its checkpoint, its reason, and files that can be read."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from common.files.strict_json import parse_json
from tests.dist import RankFailure
from tests.trainer.runs import SMALL_ENCODER, pack_images, train
from tests.trainer.tiny import tiny_config
from trainer.config import DataConfig
from trainer.features.online_knn import OnlineKnnConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.report.history import read_history
from trainer.state.run_list import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose first step sends its weights out of all bounds."""
    folder = tmp_path_factory.mktemp("diverged")
    data = pack_images(folder)
    config = tiny_config(
        data,
        folder / "run",
        encoder=SMALL_ENCODER,
        optim=OptimConfig(name="sgd", base_lr=1e12, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_epochs=0),
        knn=OnlineKnnConfig(every_epochs=1, k=5),
    )
    config = dataclasses.replace(config, data=DataConfig(train=(data,), test=(data,)))
    message = "step 6, and its last checkpoint is saved, but its encoder is of no use: the en"
    with pytest.raises(RankFailure, match=message):
        train(2, config)
    return config.out


def test_its_last_checkpoint_is_there(run: Path) -> None:
    assert parse_json((run / "checkpoints" / "latest.json").read_bytes())["step"] == 6
    assert not (run / "checkpoints" / "best.json").exists()


def test_every_file_of_it_is_json(run: Path) -> None:
    records = [parse_json(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert [record["loss"] is None for record in records] == [False, *[True] * 5]
    assert records[-1]["knn_top1"] is None
    assert records[-1]["knn_best_top1"] == 0.0
    lines = (run / "nonfinite.jsonl").read_bytes().splitlines()
    assert [parse_json(line)["loss"] for line in lines] == ["nan"] * 5
    for path in run.rglob("*.json"):
        parse_json(path.read_bytes())


def test_its_readers_take_it(run: Path) -> None:
    history = read_history(run)
    assert history.events.skipped == (2, 3, 4, 5, 6)
    assert np.isnan(history.metrics["loss"]).tolist() == [False, *[True] * 5]
    facts = read_run(run)
    assert (facts.step, facts.loss, facts.knn_top1) == (6, None, None)
