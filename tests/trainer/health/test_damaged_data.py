"""A run over a file with damaged samples: the same on any ranks, counted, and within its budget."""

import dataclasses
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.packing.pack import PackConfig, pack
from tests.data_pipeline import damaged
from tests.dist import RankFailure
from tests.trainer.runs import (
    SMALL_ENCODER,
    checkpoint_bytes,
    metrics,
    pack_images,
    samples,
    train,
    train_all,
)
from tests.trainer.tiny import tiny_config
from trainer.config import DataConfig, RunConfig
from trainer.health.damaged_samples import FILE, SubstituteLog
from trainer.prepare import prepare

pytestmark = pytest.mark.reliability(19)

COUNT = 48
NOT_A_JPEG, FAR_AWAY, EMPTY = 5, 17, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pack_images(folder, count=COUNT)
    path = folder / "jpegs.beton"
    pack(str(folder / "images"), path, PackConfig(format="jpeg", workers=1), progress=False)
    damaged.overwritten(path, path, {NOT_A_JPEG: damaged.ZEROS})
    change = damaged.together(damaged.far_away(FAR_AWAY), damaged.empty(EMPTY))
    return damaged.changed(path, folder / "damaged.beton", change)


def config(data: Path, out: Path, allowed: float = 3, **changes: Any) -> RunConfig:
    small = {"batch": 24, "steps": 6, "encoder": SMALL_ENCODER}
    base = tiny_config(data, out, **{**small, **changes})
    return dataclasses.replace(base, data=DataConfig(train=(data,), max_substitutes=allowed))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def test_a_run_goes_on_over_damaged_samples_alike_on_any_ranks_and_after_a_stop(
    data: Path, tmp_path: Path
) -> None:
    one, two, stopped = (config(data, tmp_path / name) for name in ("one", "two", "stopped"))
    assert train(1, one) == "done"
    assert train_all(2, [(two, 0), (stopped, 3)]) == ["done", "stopped"]
    assert train(2, stopped) == "done"

    # Three epochs of two steps see each sample once: which step, the order says.
    found = lines(one.out)
    assert sorted(line["sample"] for line in found) == sorted(3 * [NOT_A_JPEG, FAR_AWAY, EMPTY])
    steps = {record["step"]: set(record["ids"]) for record in samples(one.out)}
    assert all(line["sample"] in steps[line["step"]] for line in found)
    reasons = {line["sample"]: line["why"] for line in found}
    assert reasons[FAR_AWAY] == "points past the end of the file"
    assert reasons[EMPTY] == "has no image data"
    assert re.fullmatch(r"does not decode \(.+\)", reasons[NOT_A_JPEG])
    for record in metrics(one.out):
        assert record["substitutes"] == sum(line["step"] == record["step"] for line in found)

    assert lines(two.out) == lines(stopped.out) == found
    assert (one.out / FILE).stat().st_mode & 0o777 == 0o600
    assert samples(one.out) == samples(two.out) == samples(stopped.out)
    assert metrics(two.out) == metrics(stopped.out)
    assert checkpoint_bytes(two.out) == checkpoint_bytes(stopped.out)


def test_a_damaged_sample_is_said_once(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with prepare(config(data, tmp_path / "run")) as run:
        for step, batch in enumerate(islice(run.remaining_batches(), 6), 1):
            run.state.step = step
            log = next(each for each in run.telemetry.readers if isinstance(each, SubstituteLog))
            log.step(step, batch)
            log.complete([{"step": step}])
            log.read([])
    said = [text for text in caplog.messages if "another is shown" in text]
    assert len(said) == 1, "those of the tables are said together"
    assert f"damaged.beton: sample {NOT_A_JPEG} does not decode" in said[0]


def test_the_online_knn_counts_the_damaged_samples_of_both_sets(data: Path, tmp_path: Path) -> None:
    sound = data.with_name("jpegs.beton")
    damaged.overwritten(sound, tmp_path / "test.beton", dict.fromkeys((1, 2, 3), damaged.ZEROS))
    files = {"train": (data,), "test": (tmp_path / "test.beton",)}
    base = config(data, tmp_path / "run", steps=2)
    enough = dataclasses.replace(base, data=DataConfig(**files, max_substitutes=4))
    assert train(2, enough) == "done"
    assert "knn_top1" in metrics(enough.out)[-1]
    few = dataclasses.replace(base, out=tmp_path / "few")
    few = dataclasses.replace(few, data=DataConfig(**files, max_substitutes=3))
    damaged.overwritten(tmp_path / "test.beton", tmp_path / "test.beton", {4: damaged.ZEROS})
    with pytest.raises(RankFailure) as failure:
        train(2, few)
    message = r"test.beton: at least 4 samples are damaged, 3 may be: 1, 2, 3, 4 \("
    assert len(re.findall(message, str(failure.value))) == 2, failure.value


def test_over_the_budget_all_ranks_end_with_the_same_error(data: Path, tmp_path: Path) -> None:
    """Two are damaged in the tables, which opening finds; the third is one too many."""
    over = config(data, tmp_path / "over", allowed=2)
    with pytest.raises(RankFailure) as failure:
        train(2, over)
    numbers = ", ".join(map(str, (NOT_A_JPEG, FAR_AWAY, EMPTY)))
    message = rf"damaged.beton: at least 3 samples are damaged, 2 may be: {numbers} \("
    assert len(re.findall(message, str(failure.value))) == 2, failure.value
    assert {line["sample"] for line in lines(over.out)} == {NOT_A_JPEG, FAR_AWAY, EMPTY}
    assert metrics(over.out), "what was done is on record"
    raised = dataclasses.replace(over, data=DataConfig(train=(data,), max_substitutes=3))
    assert train(2, raised) == "done"


def test_what_a_run_met_before_a_stop_counts_after_it(data: Path, tmp_path: Path) -> None:
    whole = config(data, tmp_path / "run", allowed=3, steps=4)
    assert train(1, whole, stop_at=2) == "stopped"
    less = dataclasses.replace(whole, data=DataConfig(train=(data,), max_substitutes=2))
    with pytest.raises(RankFailure, match="at least 3 samples are damaged, 2 may be"):
        train(1, less)


def test_by_default_a_damaged_sample_of_a_small_file_is_put_up_with_and_two_are_not(
    data: Path, tmp_path: Path
) -> None:
    assert DataConfig(train=(data,)).max_substitutes == 0.0001
    with pytest.raises(RankFailure, match="at least 2 samples are damaged, 1 may be: 17, 40"):
        train(1, config(data, tmp_path / "run", allowed=0.0001))
