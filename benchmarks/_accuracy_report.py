"""What accuracy.py prints and writes."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIXELS, UNTRAINED = "raw pixels", "untrained encoder"


class Report:
    """Prints figures as they come, and keeps them in a JSON file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"settings": settings, "results": []}

    def add(self, key: str, value: Any) -> None:
        self.values[key] = value
        self._write()

    def result(self, name: str, seed: int, **figures: Any) -> None:
        self.values["results"].append({"name": name, "seed": seed, **figures})
        self._write()
        shown = "  ".join(
            f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)
        )
        print(f"  {name:36} seed {seed}: {shown}", flush=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.values["results"] if row["name"] == name]

    def mean(self, name: str, figure: str) -> float:
        """Over seeds."""
        return statistics.mean(row[figure] for row in self.rows(name))

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")


def print_table(report: Report, beside: Mapping[str, str | None]) -> None:
    """Means over seeds, and where we stand beside a peer.

    Args:
        report: what was measured.
        beside: contenders in order, ours before those that are compared with it.
    """
    turns = report.values.get("seconds per step", {})
    print(f"\n{'':36}{'kNN %':>8}{'linear %':>10}{'s/step':>9}{'CPU s/step':>12}", end="")
    print("   ours beside it: points of kNN, of linear; times as fast: clock, processor")
    figures: dict[str | None, list[float]] = {}
    for name in (PIXELS, UNTRAINED, *beside):
        if not report.rows(name):
            continue
        own = [100 * report.mean(name, "knn"), 100 * report.mean(name, "linear")]
        own += [statistics.median(column) for column in zip(*turns.get(name, []))]
        figures[name] = own
        line = f"{name:36}{own[0]:8.1f}{own[1]:10.1f}"
        line += f"{own[2]:9.3f}{own[3]:12.3f}" if own[2:] else ""
        mine = figures.get(beside.get(name))
        if mine is not None:
            line += f"   {mine[0] - own[0]:+.1f} {mine[1] - own[1]:+.1f}"
            line += "".join(f" x {theirs / our:.2f}" for our, theirs in zip(mine[2:], own[2:]))
        print(line)
