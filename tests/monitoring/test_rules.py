"""Rules, alerts and dashboard: valid, and of nothing that no endpoint shows."""

import json
import re
from pathlib import Path

import pytest

from tests.monitoring.dashboard import DASHBOARD, dashboard, expressions, panels
from tests.monitoring.scrapes import (
    MONITORING,
    metric_names,
    metrics_text,
    needs_prometheus,
    promtool,
)

RULES = sorted(MONITORING.glob("*.yml"))
# Names of recording rules have colons: level:metric:operations.
_RECORDED = re.compile(r"\w+:widebatch_\w+:\w+")


@needs_prometheus
def test_the_rules_are_valid() -> None:
    said = promtool("check", "rules", *map(str, RULES))
    assert said.count("SUCCESS") == 2


@needs_prometheus
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts.test.yml")))


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    text = (MONITORING / "alerts.yml").read_text()
    tested = Path(__file__).with_name("alerts.test.yml").read_text()
    alerts = re.split(r"^      - alert: ", text, flags=re.MULTILINE)[1:]
    assert len(alerts) == 6
    for alert in alerts:
        name = alert.split("\n")[0]
        assert name in tested
        for key in ("for:", "severity:", "summary:", "description:"):
            assert key in alert, f"{name} has no {key}"


@needs_prometheus
def test_names_follow_the_conventions() -> None:
    promtool("check", "metrics", stdin=metrics_text())


def test_rules_and_dashboard_use_only_metrics_that_exist() -> None:
    exists = metric_names(metrics_text())
    rules = "\n".join(path.read_text() for path in RULES)
    recorded = set(re.findall(r"record: (\S+)", rules))
    queries = "\n".join(expressions())
    variables = "\n".join(v.get("definition", "") for v in dashboard()["templating"]["list"])
    used = metric_names(rules + queries + variables)
    assert used
    assert used <= exists, f"no such metrics: {sorted(used - exists)}"
    assert set(_RECORDED.findall(rules + queries)) <= recorded


def test_every_metric_is_on_the_dashboard_or_in_a_rule() -> None:
    text = DASHBOARD.read_text() + "".join(path.read_text() for path in RULES)
    for_queries_by_hand = {
        "widebatch_build_info",
        "widebatch_epoch",
        "widebatch_ranks",
        "widebatch_global_batch_images",
    }
    families = set(re.findall(r"^# TYPE (\S+)", metrics_text(), flags=re.MULTILINE))
    assert {name for name in families if name not in text} == for_queries_by_hand


def test_every_metric_is_explained() -> None:
    families = set(re.findall(r"^# TYPE (\S+)", metrics_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`(widebatch_\w+)`", (MONITORING / "README.md").read_text())) == families


@needs_prometheus
def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    found = expressions()
    rules = [{"record": f"query_{i}", "expr": e} for i, e in enumerate(found)]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(found)} rules found" in promtool("check", "rules", str(path))


def test_every_panel_has_a_title_a_unit_a_description_and_the_chosen_data_source() -> None:
    variables = {v["name"]: v["type"] for v in dashboard()["templating"]["list"]}
    assert variables == {
        "datasource": "datasource",
        "run": "query",
        "rank": "query",
        "phase": "query",
    }
    source = {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert 'run=~"$run"' in target["expr"]


def test_no_two_panels_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{other} and {panel['title']} overlap"


@pytest.mark.parametrize("path", [*RULES, DASHBOARD], ids=lambda path: path.name)
def test_files_say_nothing_of_a_place(path: Path) -> None:
    """No address and no id of some server's data source: they work wherever they are loaded."""
    text = path.read_text()
    assert not re.search(r"https?://|localhost|\d+\.\d+\.\d+\.\d+", text)
