"""The model card: what an exported encoder is, in Markdown, filled from the run's files alone.

A number that no file of the run has is not in it: the card says "not recorded" instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from common.errors import DataError
from common.files.strict_json import parse_json, read_json_file
from trainer.models.encoders import is_resnet
from trainer.state.run_data import section, stored_paths


def model_card(run: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card's text, by the template ``card.md`` beside this file.

    Args:
        run: its folder; metrics.jsonl and evaluation/*.json are read where they are there.
        config: of :func:`trainer.state.checkpoint.load_encoder_state`.
        facts: of the export.
    """
    step, metrics = facts.get("step"), _metrics(run, facts.get("step"))
    trained, encoder = (section(config, name) for name in ("run", "encoder"))
    total, seconds = trained.get("total_steps"), _training_seconds(config.get("batch"), metrics)
    return _TEMPLATES.get_template("card.md").render(
        config=config,
        facts=facts,
        # The name alone: folders are nobody's business.
        file=", ".join(path.name for path in stored_paths(config, "train")) or None,
        classes=len(trained.get("class_names") or ()) or None,
        stem=encoder.get("stem") if is_resnet(str(encoder.get("name"))) else "its own",
        hours=None if seconds is None else f"{seconds / 3600:.3g}",
        results=[*_in_training(metrics), *_evaluations(run / "evaluation", step)],
        unfinished=type(step) is int and type(total) is int and step < total,
    )


def _cell(value: Any) -> str:
    if value is None or isinstance(value, jinja2.Undefined):
        return "not recorded"
    text = f"{value:,}" if type(value) is int else f"{value:.6g}" if type(value) is float else value
    return " ".join(str(text).replace("|", "\\|").split())


def _code(text: Any) -> str:
    return "`" + str(text).replace("`", "'") + "`"


_TEMPLATES = jinja2.Environment(  # noqa: S701  # Markdown, where nothing is to be escaped
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.ChainableUndefined,  # what no file of the run has
    trim_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"cell": _cell, "code": _code}


def _training_seconds(batch: Any, metrics: list[dict[str, Any]]) -> float | None:
    """The steps' own time; evaluation and checkpoints are not in a throughput."""
    speeds = [record.get("images_per_second") for record in metrics]
    if type(batch) is not int or not speeds or not all(_is_positive(speed) for speed in speeds):
        return None
    return sum(batch / float(speed) for speed in speeds if speed is not None)


def _in_training(metrics: list[dict[str, Any]]) -> list[str]:
    """What the run itself measured last."""
    lines = []
    if metrics and _is_positive(metrics[-1].get("loss")):
        lines.append(f"Training loss at step {metrics[-1]['step']}: {metrics[-1]['loss']:.4g}")
    online = [record for record in metrics if _is_positive(record.get("knn_top1"))]
    if online:
        step, top1 = online[-1]["step"], online[-1]["knn_top1"]
        lines.append(f"Online kNN at step {step}: {top1:.2%} top-1 of the test file")
    return lines


def _evaluations(folder: Path, step: Any) -> list[str]:
    """What ``widebatch evaluate`` wrote of this very step."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = read_json_file(path)
        except (DataError, FileNotFoundError):
            continue  # another program's file
        encoder = section(report, "encoder")
        same = encoder.get("kind") in ("run", "exported") and encoder.get("step") == step
        if same and _is_positive(report.get("top1")):
            lines.append(
                f"{report.get('method')} ({report.get('protocol')}): {report['top1']:.2%} top-1 "
                f"of {report.get('n_test')} test images, {report.get('n_train')} labels, "
                f"{report.get('num_classes')} classes ({_code(path.name)})"
            )
    return lines


def _metrics(run: Path, step: Any) -> list[dict[str, Any]]:
    """Records of the steps up to the exported one; none where the file is not there or not ours."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:  # NaN, or a torn last line
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return [record for record in records if type(step) is not int or record["step"] <= step]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0
