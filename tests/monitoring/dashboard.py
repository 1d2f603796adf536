"""The Grafana dashboard, as its reader here: panels and queries."""

import json
import re
from typing import Any

from tests.monitoring.scrapes import MONITORING

DASHBOARD = MONITORING / "grafana.json"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions(run: str = ".*", rank: str = ".*", phase: str = "loader") -> list[str]:
    """All queries of the dashboard, its variables chosen."""
    chosen = {"run": run, "rank": rank, "phase": phase}
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    found += [note["expr"] for note in dashboard()["annotations"]["list"]]
    found = [query.replace("$__rate_interval", "1m") for query in found]
    return [re.sub(r"\$(run|rank|phase)\b", lambda m: chosen[m[1]], query) for query in found]
