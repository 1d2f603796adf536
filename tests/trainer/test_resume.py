"""A run that was stopped and went on equals one that never stopped, byte for byte."""

import dataclasses
from pathlib import Path

import pytest

from common.errors import ConfigError
from data_pipeline.reading.manifest import manifest_path
from tests.dist import RankFailure
from tests.trainer.runs import (
    SMALL_ENCODER,
    assert_equal_runs,
    checkpoint_bytes,
    metrics,
    pack_images,
    samples,
    saved_state,
    smooth,
    train,
)
from tests.trainer.tiny import tiny_config
from trainer.loop import fit
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two processes: one epoch of five and three steps of the next."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(2, tiny_config(data, out, steps=8)) == "done"
    return out


@pytest.mark.reliability(1)
def test_the_same_seed_twice_is_the_same_run(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    train(2, tiny_config(data, tmp_path / "run", steps=8))
    assert_equal_runs(undisturbed, tmp_path / "run")


@pytest.mark.reliability(2)
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="first", marks=pytest.mark.slow),
        pytest.param(3, id="mid-epoch"),
        pytest.param(5, id="epoch-end"),
        pytest.param(7, id="last-but-one", marks=pytest.mark.slow),
        pytest.param(8, id="last", marks=pytest.mark.slow),
    ],
)
def test_stopped_by_one_rank_and_gone_on_with(
    data: Path, tmp_path: Path, undisturbed: Path, step: int
) -> None:
    config = tiny_config(data, tmp_path / "run", steps=8)
    assert train(2, config, stop_at=step) == ("stopped" if step < 8 else "done")
    assert metrics(config.out)[-1]["step"] == step
    assert train(2, config) == "done"
    assert_equal_runs(undisturbed, config.out)


@pytest.mark.reliability(2)
@pytest.mark.slow
def test_stopped_and_gone_on_with_on_four_processes(data: Path, tmp_path: Path) -> None:
    """With more than two ranks the order of addition counts: DDP's buckets must be the same."""
    straight = tiny_config(data, tmp_path / "straight", steps=8)
    stopped = tiny_config(data, tmp_path / "stopped", steps=8)
    assert train(4, straight) == "done"
    assert train(4, stopped, stop_at=4) == "stopped"
    assert train(4, stopped) == "done"
    assert_equal_runs(straight.out, stopped.out)


@pytest.mark.slow
def test_gone_on_with_at_other_world_sizes(data: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 3 processes: the same samples in every step, losses within rounding."""
    straight = smooth(tiny_config(data, tmp_path / "straight", steps=8))
    assert train(2, straight) == "done"
    config = dataclasses.replace(straight, out=tmp_path / "run")
    for world_size, stop_at in ((2, 3), (1, 2), (3, 0)):
        train(world_size, config, stop_at=stop_at)
    assert samples(config.out) == samples(straight.out)
    for mine, other in zip(metrics(config.out), metrics(straight.out), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_finished_run_is_left_alone(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2)
    assert train(1, config) == "done"
    before = checkpoint_bytes(config.out)
    assert train(1, config) == "done"
    assert checkpoint_bytes(config.out) == before
    assert [record["step"] for record in metrics(config.out)] == [1, 2]


def test_other_settings_are_refused_by_name_unless_forced(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2)
    train(1, config)
    changed = dataclasses.replace(config, seed=1)
    with pytest.raises(RankFailure, match=r"other settings \(seed: 0 -> 1\).*--resume force"):
        train(1, changed)
    assert train(1, dataclasses.replace(changed, resume="force", steps=3)) == "done"


def test_what_is_forced_is_said_and_what_it_comes_to(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(
        data, tmp_path / "run", encoder=SMALL_ENCODER, steps=2, micro_batch=12,
        micro_batch_norm="piece", optim=OptimConfig(name="sgd", base_lr=1.0),
        schedule=ScheduleConfig(kind="constant", warmup_epochs=0),
    )  # fmt: skip
    fit(config)
    assert "BatchNorm statistics are those of a piece: another number of processes" in caplog.text
    smaller = dataclasses.replace(config, micro_batch=8, steps=3)
    with pytest.raises(ConfigError, match=r"micro_batch: 12 -> 8; steps: 2 -> 3"):
        fit(smaller)
    faster = dataclasses.replace(smaller, optim=OptimConfig(name="sgd", base_lr=4.0), batch=12)
    caplog.clear()
    fit(dataclasses.replace(faster, resume="force"))
    said = [
        record.getMessage() for record in caplog.records if "--resume force" in record.getMessage()
    ]
    assert said == [
        "--resume force: batch: 24 -> 12",
        "--resume force: micro_batch: 12 -> 8",
        "--resume force: optim.base_lr: 1.0 -> 4.0",
        "--resume force: steps: 2 -> 3",
        "--resume force: learning rate of step 3: 0.09375 -> 0.1875",
        "--resume force: epoch of step 3: 0.4 -> 0.2",
    ]
    assert metrics(config.out)[-1]["lr"] == 0.1875


def test_a_finished_run_has_the_checkpoint_of_its_last_step(undisturbed: Path) -> None:
    assert saved_state(undisturbed)["step"] == 8


@pytest.mark.reliability(20)
def test_other_data_under_another_name_is_refused_unless_forced(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2, encoder=SMALL_ENCODER)
    train(1, config)
    (tmp_path / "other").mkdir()
    other = pack_images(tmp_path / "other", count=60)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, train=other))
    with pytest.raises(RankFailure, match=r"is not the data that.*--resume force"):
        train(1, moved)
    assert train(1, dataclasses.replace(moved, resume="force", steps=3)) == "done"


@pytest.mark.reliability(20)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_data_file_whose_bytes_changed_is_refused_unless_forced(
    tmp_path: Path, with_manifest: bool
) -> None:
    """One bit of an image, the same size, and the manifest as it was."""
    data = pack_images(tmp_path)
    if not with_manifest:
        manifest_path(data).unlink()
    config = tiny_config(data, tmp_path / "run", steps=2, encoder=SMALL_ENCODER)
    assert train(1, config) == "done"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    longer = dataclasses.replace(config, steps=3)
    reason = "its content has changed" if with_manifest else "is not the data that"
    with pytest.raises(RankFailure, match=rf"ConfigError: .*{reason}.*--resume force"):
        train(1, config)
    assert train(1, dataclasses.replace(longer, resume="force")) == "done"


@pytest.mark.reliability(20)
def test_a_copy_of_the_data_is_the_data(tmp_path: Path) -> None:
    """With another time of change and at another place, as on a node's own disk."""
    data = pack_images(tmp_path)
    config = tiny_config(data, tmp_path / "run", steps=2, encoder=SMALL_ENCODER)
    assert train(1, config, stop_at=1) == "stopped"
    (tmp_path / "disk").mkdir()
    copy = tmp_path / "disk" / data.name
    for path in (data, manifest_path(data)):
        (tmp_path / "disk" / path.name).write_bytes(path.read_bytes())
        path.unlink()
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, train=copy))
    assert train(1, moved) == "done"


def test_a_folder_with_a_run_is_refused_where_it_must_be_new(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=1)
    train(1, config)
    with pytest.raises(RankFailure, match="holds a run already"):
        train(1, dataclasses.replace(config, resume="never"))
