"""What ``widebatch evaluate`` measured of a run, and left in RUN/evaluation."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files.strict_json import read_json_file
from trainer.report.figures import Bar
from trainer.report.history import number_in

log = logging.getLogger(__name__)

KINDS = {"pixels": "raw pixels", "untrained": "untrained encoder", "run": "pretrained encoder"}
"""What is compared: kinds of sources of ``widebatch evaluate``, in the order they are shown."""

# Figures of the methods, by their keys: a name for people, and whether it is a share of 1.
_FIGURES = {
    "top1": ("top-1", True),
    "top5": ("top-5", True),
    "mean_average_precision": ("mAP", True),
    "nmi": ("NMI", False),
    "ari": ("ARI", False),
    "purity": ("purity", True),
    "alignment": ("alignment", False),
    "uniformity": ("uniformity", False),
    "effective_rank": ("effective rank", False),
    "feature_std": ("feature std", False),
}


@dataclass(frozen=True)
class Measured:
    """One file of ``evaluation/``."""

    file: str
    method: str
    of: str
    """What was measured: one of :data:`KINDS`, or as the file says."""
    figures: tuple[tuple[str, str], ...]
    """Name and value, for people."""


def read_measured(run: Path) -> tuple[Measured, ...]:
    """Every evaluation in the folder that has a figure, in the order of their files' names.

    Raises:
        DataError: there is none.
    """
    found = []
    for path, report in _files(run):
        encoder = report.get("encoder")
        kind = str(encoder.get("kind", "")) if isinstance(encoder, Mapping) else ""
        kind = "run" if kind == "exported" else kind
        method = f"{report.get('method', '')} ({report.get('protocol', '?')})".strip()
        figures = tuple(_figures(report))
        if figures:
            found.append(Measured(path.name, method, KINDS.get(kind, kind), figures))
    if not found:
        raise DataError(_none(run))
    return tuple(found)


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, (name, is_share) in _FIGURES.items():
        value = number_in(report.get(key))
        if value == value:
            yield name, f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def read_evaluations(run: Path) -> tuple[list[Bar], float]:
    """Accuracies that ``widebatch evaluate`` left, as bars, and that of guessing.

    Pixels come before untrained and trained encoders, whatever the files are called.

    Raises:
        DataError: there is none.
    """
    reports = []
    for path, report in _files(run):
        if "top1" not in report:  # of what is measured without labels
            continue
        try:
            reports.append((_bar(report), int(report["num_classes"])))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.info("left out: %s (no accuracy: %r)", path, error)
    if not reports:
        raise DataError(_none(run))
    return [bar for bar, _ in reports], 1.0 / max(1, *(classes for _, classes in reports))


def _files(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted((run / "evaluation").glob("*.json")):
        try:
            yield path, read_json_file(path)
        except (DataError, FileNotFoundError) as error:
            log.info("left out: %s (%s)", path, error)


def _none(run: Path) -> str:
    return f"{run / 'evaluation'}: no evaluations; 'widebatch evaluate' writes them there"


def _bar(report: dict[str, Any]) -> Bar:
    kind = report["encoder"]["kind"]
    kind = "run" if kind == "exported" else kind
    return Bar(_protocol(report), KINDS[kind], float(report["top1"]), list(KINDS).index(kind))


def _protocol(report: dict[str, Any]) -> str:
    """How an accuracy was measured, in words for an axis."""
    protocol = report["protocol"]
    name = "kNN" if protocol == "weighted-knn" else f"{report.get('method', 'linear')} ({protocol})"
    few = report["settings"].get("labels_per_class")
    labels = f"{few} labels\nper class" if few else f"{report['n_train']:,}\nlabels"
    return f"{name}\n{labels}"
