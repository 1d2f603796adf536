"""A slow rank is named by its own work, not by the waits that it causes in the others."""

import dataclasses
import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.collectives import observe, waiting
from common.errors import ConfigError
from tests.monitoring.scrapes import NODES, RUN_FACTS
from tests.trainer.faulty import small_config, train_with_faults
from tests.trainer.runs import pack_images
from trainer.health import phases as phases_module
from trainer.health.phases import PHASES, WAITS, Phases
from trainer.health.stragglers import StragglerConfig, Stragglers, summary
from trainer.telemetry import TelemetryConfig
from trainer.telemetry.prometheus import Prometheus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"))


def seconds(work: list[float], **phases: list[float]) -> dict[str, list[float]]:
    """A reading in which ranks do ``work`` in the forward pass and wait for the slowest."""
    zero = [0.0] * len(work)
    found = {**dict.fromkeys(PHASES, zero), "forward": work, **phases}
    total = [sum(values) for values in zip(*found.values())]
    return {**found, WAITS: [max(total) - own for own in total]}


def judge(**settings: Any) -> Stragglers:
    device = torch.device("cpu")
    return Stragglers(StragglerConfig(**settings), Phases(device), device, speaks=True)


# --- who is slow --------------------------------------------------------------------------------


@pytest.mark.reliability(18)
@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_a_rank_three_times_slower_is_named_after_as_many_readings_as_set(
    world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    stragglers = judge(readings=3)
    work = [1.0] * world_size
    work[1] = 3.0
    for _ in range(2):
        assert stragglers.judge(seconds(work)) == {}
    assert stragglers.judge(seconds(work)).keys() == {1}
    stragglers.judge(seconds(work))
    assert [r.message for r in caplog.records] == [
        "rank 1 is slow: forward takes 3e+03 ms a step, 1e+03 ms on the median rank; look at its"
        " node"
    ]
    assert stragglers.judge(seconds([1.0] * world_size)) == {}


def test_ranks_that_differ_as_they_always_do_are_not_named() -> None:
    stragglers = judge(readings=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        work = (1 + 0.2 * torch.rand(8, generator=generator)).tolist()
        # Thrice the median of next to nothing is still next to nothing.
        assert stragglers.judge(seconds(work, loader=[0.001] * 7 + [0.01])) == {}


def test_a_slow_loader_is_named_as_such() -> None:
    stragglers = judge(readings=1)
    assert "loader takes" in stragglers.judge(seconds([1.0] * 4, loader=[0, 0, 0, 0.9]))[3]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"straggler\.factor"):
        StragglerConfig(factor=0.9)
    with pytest.raises(ConfigError, match=r"straggler\.readings"):
        StragglerConfig(readings=0)


# --- what a rank's own work is ------------------------------------------------------------------


class _Clock:
    """Passes as it is told, for the host and for the events of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.events = 0.0, 0
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                clock.events += 1

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, later: "Event") -> float:
                return 1000 * (later.at - self.at)

            def synchronize(self) -> None:
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        times = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
        monkeypatch.setattr(phases_module, "time", times)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_waits_are_taken_off_the_phase_that_they_are_in(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every window anew."""
    clock = _Clock(monkeypatch)
    phases = Phases(torch.device(device))
    expected = {**dict.fromkeys(PHASES, 0), "augment": 1, "forward": 2, "backward": 4, WAITS: 12}
    observe(phases)
    try:
        for step in range(1, 14):  # the first one is not counted
            phases.step(step)
            if phases.steps == 3:
                assert dict(zip((*PHASES, WAITS), phases.harvest())) == pytest.approx(expected)
                assert phases.steps == 0
            for phase, work, wait in (("augment", 1, 0), ("forward", 2, 5), ("backward", 4, 7)):
                phases.enter(phase)
                clock.now += work
                with waiting("the others"):
                    assert phases.place.waiting == "the others"
                    clock.now += wait
            assert (phases.place.step, phases.place.phase) == (step, "backward")
            assert phases.place.patient == (step == 1)
            with phases.aside("evaluation"):
                assert phases.place.patient
                clock.now += 100
    finally:
        observe(None)


def test_the_clock_of_steps_stands_still_while_work_is_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock(monkeypatch)
    phases = Phases(torch.device("cpu"))
    clock.now = 3.0
    with phases.aside("evaluation"):
        clock.now = 103.0
        assert phases.clock() == 3.0
    clock.now = 104.0
    assert phases.clock() == 4.0


def test_what_follows_the_last_gradient_is_waiting() -> None:
    phases = Phases(torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    phases.watch_gradients(model)
    phases.step(1)
    phases.step(2)
    phases.enter("backward")
    model(torch.ones(1, 2)).sum().backward()
    assert phases.place.waiting == "gradients: all-reduce"
    phases.enter("optimizer")
    assert phases.place.waiting == ""
    phases.step(3)
    assert phases.harvest()[-1] > 0


def test_no_moment_is_kept_where_nobody_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of a GPU would pile up through a run of a million steps."""
    clock = _Clock(monkeypatch)
    phases = Phases(torch.device("cuda"), timed=False)
    for step in range(1, 5):
        phases.step(step)
        phases.enter("forward")
        phases.begin("the others")
        assert (phases.place.step, phases.place.waiting) == (step, "the others")
        phases.end()
        with phases.aside("evaluation"):
            assert phases.place.patient
    assert (clock.events, phases._spans) == (0, [])


def test_nobody_is_told_of_waits_after_a_run() -> None:
    phases = Phases(torch.device("cpu"))
    observe(phases)
    observe(None)
    with waiting("x"):
        assert phases.place.waiting == ""


# --- what is shown ------------------------------------------------------------------------------


def test_prometheus_shows_seconds_by_rank_and_phase() -> None:
    endpoint = Prometheus("127.0.0.1", 0, RUN_FACTS, NODES)
    try:
        for _ in range(2):
            endpoint.show_ranks(seconds([5.0, 2.5]), {0})
        url = f"http://127.0.0.1:{endpoint.port}/metrics"
        text = urllib.request.urlopen(url, timeout=20).read().decode()
    finally:
        endpoint.close()
    assert 'widebatch_phase_seconds_total{node="n0",phase="forward",rank="0"} 10.0' in text
    assert 'widebatch_phase_seconds_total{node="n1",phase="collectives",rank="1"} 5.0' in text
    assert 'widebatch_rank_straggling{node="n0",rank="0"} 1.0' in text
    assert 'widebatch_rank_straggling{node="n1",rank="1"} 0.0' in text


def test_a_record_holds_median_and_most_whatever_the_number_of_ranks() -> None:
    told = summary(seconds([0.5, 0.25, 0.25]))
    assert told["forward"] == {"median": 0.25, "max": 0.5, "rank": 0}


# --- whole runs ---------------------------------------------------------------------------------


def readings(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "phase_seconds" in record]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.reliability(18)
def test_a_slow_rank_of_a_run_is_named_and_no_rank_of_200_clean_steps(
    data: Path, tmp_path: Path
) -> None:
    clean = small_config(
        data,
        tmp_path / "clean",
        steps=200,
        log_samples=False,
        telemetry=TelemetryConfig(tensorboard=False, log_every=10),
    )
    (text, *_) = train_with_faults(4, clean, timeout=600)
    assert "is slow" not in (text or "")
    found = readings(clean.out)
    assert len(found) >= 19
    assert not any(record["stragglers"] for record in found)
    usual = found[-1]["phase_seconds"]
    work = sum(usual[name]["median"] for name in PHASES)
    slow = dataclasses.replace(clean, out=tmp_path / "slow", steps=60)
    delay = f"step.start rank=2 sleep:{2 * work:.4f} pass=1+"  # with its own work, three times
    (text, *_) = train_with_faults(4, slow, delay, timeout=600)
    assert "rank 2 is slow" in (text or "")
    assert not any(f"rank {rank} is slow" in (text or "") for rank in (0, 1, 3))
    assert readings(slow.out)[-1]["stragglers"] == 1
