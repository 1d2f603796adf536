"""One stream of records, several readers."""

import json
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, NumericalError
from tests.monitoring.scrapes import NODES, RUN_FACTS, get
from trainer.health.non_finite import NumericalGuard
from trainer.telemetry import (
    JsonLines,
    LogLines,
    ProgressBar,
    Reader,
    Record,
    Telemetry,
    TelemetryConfig,
    TensorBoard,
    keep_lines,
)
from trainer.telemetry.prometheus import Prometheus


class Collect(Reader):
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.calls = 0

    def read(self, records: list[Record]) -> None:
        self.calls += 1
        self.records += records


def record(step: int, **more: float) -> Record:
    base = {"step": step, "epoch": 0, "loss": 1.0, "lr": 0.1, "images_per_second": 8.0}
    return {**base, "skipped": 0, **more}


def test_every_step_has_a_record_though_the_device_is_read_rarely() -> None:
    collect = Collect()
    telemetry = Telemetry(TelemetryConfig(log_every=4), 16, [collect])
    for step in range(1, 11):
        telemetry.step({"step": step}, loss=torch.tensor(float(step)))
        telemetry.flush_if_due()
    assert collect.calls == 2
    telemetry.close()
    assert [r["step"] for r in collect.records] == list(range(1, 11))
    assert [r["loss"] for r in collect.records] == [float(s) for s in range(1, 11)]
    assert all(r["images_per_second"] > 0 for r in collect.records)


def test_the_time_of_a_step_is_that_of_the_clock_and_the_first_has_none() -> None:
    endpoint = Prometheus("127.0.0.1", 0, RUN_FACTS, NODES)
    endpoint.clock = iter([1.0, 3.0, 4.0]).__next__
    for _ in range(3):
        endpoint.count()
    text = get(f"http://127.0.0.1:{endpoint.port}/metrics")
    endpoint.close()
    assert "widebatch_step_seconds_sum 3.0" in text and "widebatch_step_seconds_count 2.0" in text


def test_a_loss_is_recorded_to_the_last_bit() -> None:
    collect = Collect()
    telemetry = Telemetry(TelemetryConfig(), 1, [collect])
    loss = torch.tensor(1 / 3, dtype=torch.float64)
    telemetry.step({"step": 1}, loss=loss)
    telemetry.flush()
    assert collect.records[0]["loss"] == loss.item()


def test_an_evaluation_joins_the_newest_step() -> None:
    collect = Collect()
    telemetry = Telemetry(TelemetryConfig(log_every=1), 1, [collect])
    telemetry.step({"step": 1}, loss=torch.tensor(0.0))
    telemetry.annotate(knn_top1=0.5)
    telemetry.flush_if_due()
    assert collect.records[0]["knn_top1"] == 0.5


def test_a_resumed_run_repeats_no_line_and_drops_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(record(step)) + "\n" for step in range(1, 7))
    path.write_text(whole + '{"step": 7, "lo')
    reader = JsonLines(path, keep_up_to=4)
    reader.read([record(5), record(6)])
    reader.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    keep_lines(path, 0)
    assert path.read_text() == ""


def test_a_line_that_is_whole_but_for_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    path.chmod(0o644)
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert path.stat().st_mode & 0o777 == 0o600
    keep_lines(tmp_path / "none.jsonl", 2)  # nothing to do
    assert [each.name for each in tmp_path.iterdir()] == ["samples.jsonl"]


def test_the_bar_moves_with_each_step_though_the_device_is_read_rarely(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bar = ProgressBar(total=30, done=4)
    telemetry = Telemetry(TelemetryConfig(log_every=10), 16, [bar])
    for step in (5, 6, 7):
        telemetry.step({"step": step, "lr": 0.1}, loss=torch.tensor(1.0))
        telemetry.flush_if_due()
        assert bar._bar.n == step
    assert "5/30 " in capsys.readouterr().err  # on the terminal with the first one
    telemetry.close()
    assert bar._bar.n == 7
    assert "7/30 " in capsys.readouterr().err


def test_until_the_first_reading_log_lines_say_the_step_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    lines = LogLines(total=30, seconds=0, done=4)
    lines.count()
    lines.count()
    assert [each.getMessage() for each in caplog.records] == ["step 5/30", "step 6/30"]
    lines.read([record(5), record(6)])
    caplog.clear()
    lines.count()
    assert not caplog.records


def test_log_lines_come_by_time_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = LogLines(total=30, seconds=3600)
    lines.read([record(1)])
    assert not caplog.records
    lines.read([record(2, knn_top1=0.5, knn_best_top1=0.75)])
    assert "kNN 50.0% (best 75.0%)" in caplog.text
    lines.read([record(30)])
    assert "step 30/30" in caplog.text


def test_the_bar_has_room_for_all_it_says_in_80_columns() -> None:
    bar = ProgressBar(31200, 0)
    record = {"loss": 9.123456, "lr": 0.00123456, "images_per_second": 51234.5}
    bar.count()
    bar.read([{**record, "step": 1, "epoch": 0, "knn_top1": 0.5334}])
    bar._bar.dynamic_ncols, bar._bar.ncols = None, 80
    shown = str(bar._bar)
    bar.close()
    assert len(shown) <= 80
    assert shown.startswith("1/31200 ")
    assert shown.endswith("loss=9.123, lr=0.00123, img/s=51234, knn=53.3%")


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, done=0)
    board.read([record(1), record(2, loss=0.5)])
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


def test_prometheus_shows_the_newest_values_on_loopback_only_by_get() -> None:
    endpoint = Prometheus("127.0.0.1", 0, RUN_FACTS, NODES)
    try:
        port = endpoint.port
        endpoint.read([record(1, loader_wait_seconds=0.5), record(2, loader_wait_seconds=0.25)])
        url = f"http://127.0.0.1:{port}/metrics"
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        assert "widebatch_step 2.0" in text
        assert "widebatch_loader_wait_seconds_sum 0.75" in text
        assert "widebatch_images_total 32.0" in text
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(url, data=b"x", timeout=5)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            Prometheus("127.0.0.1", port, RUN_FACTS, NODES)
    finally:
        endpoint.close()


def test_lost_numbers_end_the_run_with_the_step_named() -> None:
    guard = NumericalGuard(3, lambda step: [])
    guard.read([record(1, skipped=1), record(2, skipped=1), record(3), record(4, skipped=1)])
    assert guard.skipped_in_a_row == 1
    with pytest.raises(NumericalError, match="step 6: gradients were not finite in 3 steps"):
        guard.read([record(5, skipped=1), record(6, skipped=1)])


def test_tensorboard_writes_to_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    board = TensorBoard(folder, 0)
    board.read([{"step": 1, "loss": 0.5}])
    board.close()
    (events,) = folder.iterdir()
    assert b"loss" in events.read_bytes()
