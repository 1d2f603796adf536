"""A data file that somebody changes under a run, and one that nobody has a checksum of."""

import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.reading.manifest import manifest_path
from tests.dist import RankFailure, run_ranks
from tests.trainer.runs import SMALL_ENCODER, metrics, pack_images, saved_state
from tests.trainer.tiny import tiny_config
from trainer.config import from_json, to_json
from trainer.state import run_folder
from trainer.state.checkpoint import CheckpointConfig


def _cut_in_step_3(rank: int, world_size: int, values: dict[str, Any]) -> None:
    from trainer.config import RunConfig
    from trainer.loop import fit

    config, steps = from_json(RunConfig, values), iter(range(1, 100))

    def cut() -> bool:
        if next(steps) == 3 and rank == 0:
            os.truncate(config.data.train[0], 4096)
        return False

    fit(config, cut)


def test_a_file_cut_under_the_run_ends_it_by_one_line_and_saves_the_last_step(
    tmp_path: Path,
) -> None:
    """So that it goes on from there, where no checkpoint was due yet."""
    data = pack_images(tmp_path)
    settings = {"encoder": SMALL_ENCODER, "checkpoint": CheckpointConfig(every_epochs=0)}
    config = tiny_config(data, tmp_path / "run", steps=20, **settings)
    whole = data.read_bytes()
    with pytest.raises(RankFailure, match=r"DataError: .*images\.beton: cut or written over"):
        run_ranks(_cut_in_step_3, 1, to_json(config), timeout=280, init_process_group=False)
    saved = saved_state(config.out)["step"]
    assert 3 <= saved == len(metrics(config.out)) < 10
    data.write_bytes(whole)
    run_ranks(_hashed, 1, to_json(config), 0, timeout=280, init_process_group=False)
    assert [each["step"] for each in metrics(config.out)] == list(range(1, 21))


def _hashed(rank: int, world_size: int, values: dict[str, Any], stop_at: int) -> int:
    from trainer.config import RunConfig
    from trainer.loop import fit

    original, calls = run_folder.sha256_of, []

    def counted(*arguments: Any) -> str:
        calls.append(1)
        return original(*arguments)

    run_folder.sha256_of = counted
    steps = iter(range(1, 100))
    fit(from_json(RunConfig, values), lambda: next(steps) == stop_at)
    return len(calls)


def test_a_file_without_a_manifest_is_hashed_once_in_the_life_of_a_run(tmp_path: Path) -> None:
    data = pack_images(tmp_path)
    manifest_path(data).unlink()
    values = to_json(tiny_config(data, tmp_path / "run", steps=4, encoder=SMALL_ENCODER))
    assert run_ranks(_hashed, 2, values, 2, timeout=280, init_process_group=False) == [1, 0]
    assert run_ranks(_hashed, 2, values, 0, timeout=280, init_process_group=False) == [0, 0]
    os.utime(data)
    values["steps"] = 4
    assert run_ranks(_hashed, 1, values, 0, timeout=280, init_process_group=False) == [1]
