"""What ``widebatch evaluate`` measured of a run, and left in RUN/evaluation."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files.strict_json import read_json_file
from trainer.report.history import number_in
from trainer.state.run_data import section

log = logging.getLogger(__name__)

KINDS = {
    "pixels": "raw pixels",
    "untrained": "untrained encoder",
    "run": "pretrained encoder",
    "average": "its average",
}
"""What is compared: kinds of sources of ``widebatch evaluate``, in the order they are shown."""

# Figures of the methods, by their keys: a name for people, and whether it is a share of 1.
_FIGURES = {
    "top1": ("top-1", True),
    "top5": ("top-5", True),
    "mean_average_precision": ("mAP", True),
    "r2": ("R2", False),
    "nmi": ("NMI", False),
    "ari": ("ARI", False),
    "purity": ("purity", True),
    "alignment": ("alignment", False),
    "uniformity": ("uniformity", False),
    "effective_rank": ("effective rank", False),
    "feature_std": ("feature std", False),
}


@dataclass(frozen=True)
class Bar:
    """One accuracy."""

    group: str
    """How it was measured; bars of a group stand together."""
    name: str
    """What was measured, one of :data:`KINDS`."""
    value: float
    """Fraction in [0, 1]."""
    chance: float = 0.0
    """Accuracy of guessing, a fraction."""


@dataclass(frozen=True)
class Measured:
    """One file of ``evaluation/``."""

    file: str
    method: str
    of: str
    """What was measured: one of :data:`KINDS`, or as the file says."""
    figures: tuple[tuple[str, str], ...]
    """Name and value, for people."""
    bar: Bar | None
    """Its accuracy, where it has one."""


def names_of(bars: Sequence[Bar]) -> list[str]:
    """The names of bars, in the order in which they stand in every group."""
    return [name for name in KINDS.values() if any(bar.name == name for bar in bars)]


def read_reports(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every evaluation in the folder, in the order of their files' names."""
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            yield path, read_json_file(path)
        except (DataError, FileNotFoundError) as error:
            log.info("left out: %s (%s)", path, error)


def read_measured(run: Path) -> tuple[Measured, ...]:
    """Every evaluation that has a figure.

    Raises:
        DataError: there is none.
    """
    found = []
    for path, report in read_reports(run):
        kind = str(section(report, "encoder").get("kind", ""))
        kind = "run" if kind == "exported" else kind
        method = f"{report.get('method', '')} ({report.get('protocol', '?')})".strip()
        figures = tuple(_figures(report))
        if figures:
            bar = _bar(report, kind)
            found.append(Measured(path.name, method, KINDS.get(kind, kind), figures, bar))
    if not found:
        place = run / "evaluation"
        raise DataError(f"{place}: no evaluations; 'widebatch evaluate' writes them there")
    return tuple(found)


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (name, is_share) in _FIGURES.items():
        value = number_in(report.get(key))
        if value == value:
            yield name, f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def _bar(report: Mapping[str, Any], kind: str) -> Bar | None:
    try:
        chance = 1.0 / max(1, int(report["num_classes"]))
        return Bar(_protocol(report), KINDS[kind], float(report["top1"]), chance)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # no accuracy, or not of one of the encoders that are compared


def _protocol(report: Mapping[str, Any]) -> str:
    """How an accuracy was measured, in words for an axis."""
    protocol = report["protocol"]
    name = "kNN" if protocol == "weighted-knn" else f"{report.get('method', 'linear')} ({protocol})"
    layer = section(report, "encoder").get("layer")
    name = f"{name}, {layer}" if layer else name
    few = report["settings"].get("labels_per_class")
    labels = f"{few} labels\nper class" if few else f"{report['n_train']:,}\nlabels"
    return f"{name}\n{labels}"
