"""Folders of runs with all that a report can show, without the training."""

import json
from pathlib import Path
from typing import Any

from tests.trainer.saved_runs import save_run
from trainer.models.encoders import EncoderConfig

SMALL: dict[str, Any] = {"max_images": 60, "device": "cpu"}
"""Arguments of ``make_pictures``."""


def write_metrics(run: Path, steps: int, **last: Any) -> None:
    """Records of so many steps; ``last`` goes into the newest."""
    records: list[dict[str, Any]] = []
    for n in range(1, steps + 1):
        record: dict[str, Any] = {"step": n, "epoch": n // 10, "loss": 5 - n / 10, "lr": 0.1}
        record |= {"images_per_second": 90.0, "skipped": 0.0, "substitutes": 0}
        record |= {"contrastive_top1": n / steps, "gradient_norm": 2.0}
        if n % 10 == 0:
            record["phase_seconds"] = {
                "forward": {"median": 0.2, "max": 0.25, "rank": 1},
                "collectives": {"median": 0.05, "max": 0.1, "rank": 0},
            }
        records.append(record)
    records[-1] |= {"knn_top1": 0.5, "knn_best_top1": 0.5, **last}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(
    run: Path,
    name: str,
    kind: str,
    top1: float,
    protocol: str = "weighted-knn",
    few: int | None = 10,
) -> None:
    """What ``widebatch evaluate --json`` leaves."""
    (run / "evaluation").mkdir(exist_ok=True)
    values = {
        "method": "knn" if protocol == "weighted-knn" else "linear",
        "top1": top1,
        "top5": 1.0,
        "n_train": 30,
        "num_classes": 3,
        "protocol": protocol,
        "settings": {"labels_per_class": few} if few else {},
        "encoder": {"kind": kind},
    }
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(values))


def finished_run(run: Path, data: Path) -> Path:
    """A run with checkpoints, metrics and evaluations."""
    save_run(run, data, EncoderConfig(name="resnet18", stem="imagenet"), test=data)
    write_metrics(run, 30)
    for name, kind, top1 in (("a", "run", 0.8), ("b", "pixels", 0.3), ("c", "untrained", 0.2)):
        write_evaluation(run, name, kind, top1)
    return run


def bare_run(run: Path, /, **changes: Any) -> Path:
    """A run with settings and metrics alone; its data is gone.

    Args:
        run: its folder.
        changes: of the settings.
    """
    run.mkdir(parents=True)
    settings = {
        "recipe": "digits-demo",
        "batch": 24,
        "seed": 5,
        "data": {"train": str(run / "gone.beton"), "test": None},
        "encoder": {"name": "resnet18"},
        "run": {"total_steps": 40},
    }
    (run / "config.json").write_text(json.dumps({**settings, **changes}))
    write_metrics(run, 30)
    return run
