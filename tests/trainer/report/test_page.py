"""The page: whole in one file, safe whatever a run calls itself, and the same for the same run."""

import base64
import errno
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.report.made_runs import SMALL, bare_run, write_evaluation, write_metrics
from tests.trainer.sleeper import sleeping_rank, suspend
from trainer.health import heartbeat
from trainer.report.charts import PLOTLY, Line, line_chart, phase_bars, short
from trainer.report.contents import read_contents
from trainer.report.history import PhaseTime
from trainer.report.live import LiveReport
from trainer.report.page import page, write_page
from trainer.report.pictures import Answers, EmbeddingMap, Pictures, Queries
from trainer.report.samples import Samples, Views

NASTY = "<script>alert(1)</script>\"'&\x00\ud800"


class Parsed(HTMLParser):
    """Elements, text and attributes of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.attributes, self.open = [], [], [], []
        self.feed(source)

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value or "") for key, value in attributes]
        if name not in ("meta", "img", "link", "wbr", "input"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def made(*runs):
    return page(read_contents(runs, Pictures()))


def test_a_live_page_says_that_a_process_is_suspended(tmp_path):
    # Two runs: a page of one is made anew when its pictures come, too.
    run, other = bare_run(tmp_path / "run"), bare_run(tmp_path / "other")
    with sleeping_rank() as (process, beat):
        heartbeat.write(run / "heartbeats", beat)
        live = LiveReport([run, other], seconds=0, **SMALL)
        assert "running, step 30 of 40" in Parsed(live.page()).text
        suspend(process, beat)
        assert "running (rank 0 is stopped), step 30 of 40" in Parsed(live.page()).text
    assert "failed (killed before its first checkpoint)" in Parsed(live.page()).text


def test_a_run_in_progress_has_a_page(tmp_path):
    run = bare_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    parsed = Parsed(made(run))
    assert parsed.open == []
    assert "step 30 of 40" in parsed.text
    for heading in ("Loss", "Learning rate", "Online kNN, top-1 (%)", "Gradient norm"):
        assert heading in parsed.text
    assert "no evaluations" in parsed.text  # and so it is said


def test_the_page_needs_nothing_else(tmp_path):
    run = bare_run(tmp_path / "run")
    write_evaluation(run, "a", "run", 0.8)
    source = made(run)
    parsed = Parsed(source)
    assert not {"iframe", "object", "base", "form"} & set(parsed.tags)
    for name, key, value in parsed.attributes:
        assert not key.startswith("on"), f"<{name} {key}>"
        if key in ("src", "href"):
            assert value.startswith(("data:image/", "data:,", "#")), f"<{name} {key}={value[:40]}>"
    ours = source.replace(PLOTLY[1], "")
    assert "http://" not in ours
    assert "https://" not in ours
    assert len(ours) < 400_000
    assert len(source.encode()) < 5 * 2**20


def test_the_policy_allows_the_pages_own_scripts_alone(tmp_path):
    source = made(bare_run(tmp_path / "run"))
    policy = next(
        value for tag, key, value in Parsed(source).attributes if value.startswith("default-src")
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert "connect-src" not in rules
    scripts = re.findall("<script>(.*?)</script>", source, re.DOTALL)
    assert len(scripts) == 2
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}
    assert set(rules["script-src"].split()) == allowed


def test_a_live_page_asks_its_server_for_the_library(tmp_path):
    run = bare_run(tmp_path / "run")
    source = page(read_contents([run], Pictures()), live_seconds=1)
    assert ("script", "src", PLOTLY[0]) in Parsed(source).attributes
    assert len(source) < 400_000


def test_nothing_that_comes_from_a_run_is_markup(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    run = bare_run(
        folder,
        recipe=NASTY,
        encoder={"name": NASTY, NASTY: NASTY},
        data={"train": NASTY},
        run={"total_steps": NASTY, "class_names": [NASTY], "versions": {"commit": NASTY}},
    )
    write_metrics(run, 30, **{NASTY: 1.0, "phase_seconds": {NASTY: {"median": NASTY}}})
    write_evaluation(run, "<b>", NASTY, 0.8, protocol=NASTY)
    (run / "checkpoints").mkdir()
    source = made(run, bare_run(tmp_path / '"><script>'))
    parsed = Parsed(source)
    assert parsed.tags.count("script") == 2
    assert not {"img", "b"} & set(parsed.tags)
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x00" not in source.replace(PLOTLY[1], "")
    source.encode()


@pytest.mark.parametrize("side", [32, 48, 224])
def test_the_page_stays_small_whatever_the_images(tmp_path, side):
    """Noise is what packs worst; the numbers of images are those of a report by default."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, (*shape, side, side, 3), np.uint8)

    labels = np.arange(400) % 10
    points = {title: rng.normal(size=(400, 2)) for title in ("raw pixels", "pretrained encoder")}
    answers = tuple(Answers(title, noise(8, 6), np.zeros((8, 6), int)) for title in points)
    samples = Samples(noise(400), np.arange(400), labels, ("<hr>", "b"))
    pictures = Pictures(
        views=Views(np.arange(8), noise(8), noise(8, 2)),
        queries=Queries(samples.take(np.arange(8)), answers),
        map=EmbeddingMap(points, samples),
        similarities={"positives": rng.random(256), "negatives": rng.random(65_280)},
    )
    source = page(read_contents([bare_run(tmp_path / "run")], pictures))
    assert len(source) - len(PLOTLY[1]) < 3_000_000
    assert Parsed(source).open == []
    assert "hr" not in Parsed(source).tags


def test_the_same_run_makes_the_same_page(tmp_path):
    run = bare_run(tmp_path / "run")
    assert made(run) == made(run)
    write_metrics(run, 31)
    assert made(run) != made(bare_run(tmp_path / "other" / "run"))


def test_runs_are_compared_in_the_same_axes(tmp_path):
    first = bare_run(tmp_path / "first")
    second = bare_run(tmp_path / "second", seed=7, encoder={"name": "resnet50"})
    write_metrics(second, 20, skipped=1.0)
    source = made(first, second)
    parsed = Parsed(source)
    (loss,) = [
        json.loads(value)["data"]
        for _, key, value in parsed.attributes
        if key == "data-figure" and "line" in value
    ][:1]
    assert [line["name"] for line in loss] == ["first", "second"]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", source)
    told = {
        re.sub("<.*?>", "", name): re.findall(r"<bdi>(.*?)</bdi>", cells)
        for name, cells in reversed(rows)  # the first of a name: where the runs stand side by side
    }
    assert told["encoder.name"] == ["resnet18", "resnet50"]
    assert told["steps left out"] == ["0", "1"]
    assert told["online kNN, last and best"] == ["50.0 %, 50.0 %"] * 2


def test_what_happened_is_marked_at_its_step(tmp_path):
    run = bare_run(tmp_path / "run")
    write_metrics(run, 30, skipped=1.0, substitutes=2)
    source = made(run)
    assert "left out for gradients that were not finite: step 30" in source
    assert "2 damaged samples replaced, noted at step 30" in source
    (figure, *_) = [value for _, key, value in Parsed(source).attributes if key == "data-figure"]
    marks = {trace["name"]: trace["x"] for trace in json.loads(figure)["data"]}
    assert marks["step left out"] == marks["damaged samples replaced"] == [30]


def test_a_failed_write_keeps_the_previous_page(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "page.html"
    write_page(path, "first")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


# --- its charts ---------------------------------------------------------------------------------


def test_a_long_run_is_drawn_with_few_points_and_no_extreme_is_lost():
    steps = np.arange(1.0, 100_001)
    values = np.ones(100_000)
    values[54_321] = 99.0
    chart = line_chart("c", "Loss", [Line("run", steps, values)])
    mean, exact = chart.figure.data
    for trace in (mean, exact):
        assert len(trace.x) <= 700
        assert (trace.x[0], trace.x[-1]) == (1, 100_000)
    assert exact.y.max() == 99.0
    assert exact.x[exact.y.argmax()] == 54_322
    assert 1 < mean.y.max() < 2
    assert len(chart.figure.to_json()) < 40_000


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-30, 1e30])
def test_one_value_makes_a_chart(value):
    chart = line_chart("c", "x", [Line("run", np.array([1.0]), np.array([value]))])
    assert chart.rows == [["1", short(value)]]
    assert "nan" not in chart.figure.to_json()


def test_numbers_are_short():
    values = (0, 4.37145, 1234.5, 12345, 2e-5)
    assert [short(value) for value in values] == ["0", "4.371", "1,234", "12,345", "2e-05"]


def test_markup_in_a_name_is_no_markup_of_a_chart():
    lines = [Line("<a href='https://elsewhere'>", np.ones(1), np.ones(1))] * 2
    (trace, _) = line_chart("c", "x", lines).figure.data
    assert "<" not in trace.name


def test_runs_whose_names_look_alike_are_bars_of_their_own():
    part = PhaseTime("forward", 0.1, 0.2, 0)
    names = [f"a-long-name-{n}-{'x' * 40}" for n in range(2)]
    (bars,) = phase_bars("p", {name: [part] for name in names}).figure.data
    assert list(bars.y) == [0, 1]
