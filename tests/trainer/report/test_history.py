"""What a report reads of a run: steps, evaluations, settings; torn, strange and old files too."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from common.errors import DataError
from tests.report.made_runs import bare_run, write_evaluation, write_metrics
from trainer.config import to_json
from trainer.recipes import RECIPES
from trainer.report.contents import differing, names, read_contents
from trainer.report.evaluations import names_of, read_measured
from trainer.report.history import columns, curves, read_history, read_records
from trainer.report.pictures import Pictures
from trainer.state.settings import changed, flat


def test_metrics_of_a_killed_run_lose_only_the_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo\xc3')
    metrics = columns(read_records(tmp_path))
    assert metrics["step"].tolist() == [1.0]
    assert metrics["loss"].tolist() == [2.5]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is no JSON object"):
        read_records(tmp_path)


def test_metrics_that_some_steps_lack_are_not_a_number_there(tmp_path):
    lines = ['{"step": 1, "loss": 2}', '{"step": 2, "loss": null, "knn_top1": 0.5, "note": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    metrics = columns(read_records(tmp_path))
    assert np.array_equal(metrics["loss"], [2.0, np.nan], equal_nan=True)
    assert np.array_equal(metrics["knn_top1"], [np.nan, 0.5], equal_nan=True)
    assert "note" not in metrics


def test_numbers_beyond_all_bounds_are_no_numbers(tmp_path):
    huge = "9" * 400
    lines = [f'{{"step": {huge}}}', f'{{"step": 1, "loss": {huge}, "lr": Infinity, "ok": 1}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert columns(read_records(tmp_path)).keys() == {"step", "ok"}


def test_an_objectives_own_numbers_have_curves_after_its_loss():
    record = {"step": 1, "epoch": 0, "loss": 3.0, "lr": 0.1, "skipped": 0, "substitutes": 0}
    own = {"jigsaw_top1": 0.5, "psnr": 20.0, "knn_top1": 0.4, "knn_top5": 0.9, "knn_best_top1": 0.4}
    assert curves(columns([record | own])) == [
        ("loss", "Loss", 1.0),
        ("jigsaw_top1", "Jigsaw top-1 (%)", 100.0),
        ("psnr", "Psnr", 1.0),
        ("knn_top1", "Online kNN, top-1 (%)", 100.0),
        ("lr", "Learning rate", 1.0),
    ]


def test_events_are_found_at_their_steps(tmp_path):
    records = [{"step": n, "skipped": float(n in (2, 3)), "substitutes": n // 4} for n in range(9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    events = read_history(tmp_path).events
    assert events.skipped == (2, 3)
    assert events.substitutes == (4, 8)
    assert events.substitute_count == 2


def test_phases_are_means_of_the_readings_and_name_the_slowest_rank(tmp_path):
    write_metrics(tmp_path, 30)
    history = read_history(tmp_path)
    forward, collectives = history.phases
    assert (forward.name, forward.median, forward.slowest, forward.rank) == (
        "forward",
        pytest.approx(0.2),
        pytest.approx(0.25),
        1,
    )
    assert collectives.name == "collectives"


def test_strange_phases_are_passed_over(tmp_path):
    records = [
        {"step": 1, "phase_seconds": {"forward": 3, "loader": {"median": "x", "max": 1}}},
        {"step": 2, "phase_seconds": []},
        {"step": 3, "phase_seconds": {"backward": {"median": 0.5, "max": 0.5, "rank": "0"}}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (backward,) = read_history(tmp_path).phases
    assert (backward.name, backward.rank) == ("backward", 0)


def test_evaluations_stand_in_groups_pixels_first(tmp_path):
    write_evaluation(tmp_path, "a", "exported", 0.8)
    write_evaluation(tmp_path, "b", "untrained", 0.2)
    write_evaluation(tmp_path, "c", "pixels", 0.3, protocol="logistic", few=None)
    (tmp_path / "evaluation" / "d.json").write_text("[]")
    (tmp_path / "evaluation" / "e.json").write_text('{"method": "cluster", "nmi": 0.25}')
    measured = read_measured(tmp_path)
    bars = [each.bar for each in measured if each.bar]
    assert [bar.chance for bar in bars] == [pytest.approx(1 / 3)] * 3
    assert [(bar.group, bar.name, bar.value) for bar in bars] == [
        ("kNN\n10 labels\nper class", "pretrained encoder", 0.8),
        ("kNN\n10 labels\nper class", "untrained encoder", 0.2),
        ("linear (logistic)\n30\nlabels", "raw pixels", 0.3),
    ]
    assert names_of(bars)[0] == "raw pixels"
    assert [each.file for each in measured] == ["a.json", "b.json", "c.json", "e.json"]
    assert dict(measured[0].figures) == {"top-1": "80.0 %", "top-5": "100.0 %"}
    assert dict(measured[-1].figures) == {"NMI": "0.25"}


def test_settings_as_the_recipe_has_them_are_no_difference():
    recipe = RECIPES["digits-demo"]()
    values = {name: to_json(getattr(recipe, name)) for name in vars(recipe) if name != "data"}
    assert changed({**values, "data": {"train": "x"}, "out": "elsewhere"}) == {}
    other = {**values, "optim": {**values["optim"], "base_lr": 2.0}, "seed": 3}
    assert changed(other) == {"optim.base_lr": ("8", "2"), "seed": ("0", "3")}


def test_a_setting_that_an_old_run_did_not_know_is_no_difference():
    assert changed({"recipe": "digits-demo", "batch": 128}) == {}
    assert changed({"recipe": "none such", "batch": 128}) is None
    assert changed({"recipe": ["digits-demo"]}) is None


def test_runs_differ_in_what_one_of_them_has_otherwise_or_not_at_all():
    runs = [{"a": {"b": 1, "c": True}, "run": {"x": 1}}, {"a": {"b": 2, "c": True}, "d": None}]
    assert differing(runs) == {"a.b": ["1", "2"], "d": ["-", "none"]}
    assert flat({"a": [1, 2.5], "b": {}}) == {"a": "1, 2.5"}


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names(paths) == ["a/run", "b/run"]
    assert names(paths[:1]) == ["run"]
    assert names([paths[0], paths[0]]) == ["run", "run"]


def test_the_state_says_whether_the_run_goes_on(tmp_path):
    run = bare_run(tmp_path / "run")
    assert read_contents([run], Pictures())[0].state == "step 30 of 40"
    write_metrics(run, 40)
    assert read_contents([run], Pictures())[0].state == "finished, step 40 of 40"


def test_a_run_whose_process_is_gone_has_stopped(tmp_path):
    from trainer.health.heartbeat import own, write

    run = bare_run(tmp_path / "run")
    mine = own(0)
    write(run / "heartbeats", mine)
    assert mine.pid == os.getpid()
    assert read_contents([run], Pictures())[0].state == "running, step 30 of 40"
    values = json.loads((run / "heartbeats" / "rank-00000.json").read_text())
    values["started"] += 1  # another process had this number
    (run / "heartbeats" / "rank-00000.json").write_text(json.dumps(values))
    said = read_contents([run], Pictures())[0].state
    assert said == "failed (killed before its first checkpoint), step 30 of 40"
    (run / "checkpoints" / "step-00000028").mkdir(parents=True)
    said = read_contents([run], Pictures())[0].state
    assert said == "stopped (killed, 2 steps to repeat), step 30 of 40"


def test_a_run_of_another_host_is_not_said_to_run_for_ever(tmp_path):
    from trainer.health.heartbeat import own, path_of, write

    run = bare_run(tmp_path / "run")
    write(run / "heartbeats", dataclasses.replace(own(0), host="node-7"))
    assert read_contents([run], Pictures())[0].state == "running, step 30 of 40"
    past = time.time() - 3600
    os.utime(path_of(run / "heartbeats", 0), (past, past))
    said = read_contents([run], Pictures())[0].state
    assert said.startswith("unknown (rank 0 on node-7 is silent for 3600 s)")


def test_a_run_before_its_first_step_says_so(tmp_path):
    run = bare_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    contents = read_contents([run], Pictures())[0]
    assert not contents.history.metrics
    assert [part for part, _ in contents.missing] == ["curves", "evaluations"]
    assert contents.bars == []
