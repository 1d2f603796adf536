"""The model card: what an exported encoder is, in Markdown, filled from the run's files alone.

A number that no file of the run has is not in it: the card says "not recorded" instead.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from common.errors import DataError
from trainer.models.encoders import is_resnet
from trainer.report.evaluations import read_reports
from trainer.report.history import Metrics, columns, number_in, read_records
from trainer.state.run_data import section, stored_paths


def model_card(run: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card's text by ``card.md``: from the run's ``config``, its metrics, its evaluations, and
    the ``facts`` of the export.
    """
    step, metrics = facts.get("step"), _metrics(run, facts.get("step"))
    trained, encoder = (section(config, name) for name in ("run", "encoder"))
    total, average = trained.get("total_steps"), facts.get("average") is True
    return _TEMPLATES.get_template("card.md").render(
        config=config,
        facts=facts,
        # The name alone: folders are nobody's business.
        file=", ".join(path.name for path in stored_paths(config, "train")) or None,
        classes=len(trained.get("class_names") or ()) or None,
        stem=encoder.get("stem") if is_resnet(str(encoder.get("name"))) else "its own",
        hours=_training_hours(config.get("batch"), metrics),
        results=[*_in_training(metrics, average), *_evaluations(run, step, average)],
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


def _metrics(run: Path, step: Any) -> Metrics:
    """Of the steps up to the exported one; none where the file is not there or not ours."""
    try:
        records = read_records(run)
    except DataError:
        return {}
    return columns([each for each in records if type(step) is not int or each["step"] <= step])


def _training_hours(batch: Any, metrics: Metrics) -> str | None:
    """The steps' own time; evaluation and checkpoints are not in a throughput."""
    speeds = metrics.get("images_per_second")
    if type(batch) is not int or speeds is None or not (speeds > 0).all():
        return None
    return f"{(batch / speeds).sum() / 3600:.3g}"


def _in_training(metrics: Metrics, average: bool) -> Iterator[str]:
    """What the run itself measured last; its accuracies are not the average's."""
    for column, line in (
        ("loss", "Training loss at step {:.0f}: {:.4g}"),
        ("knn_top1", "Online kNN at step {:.0f}: {:.2%} top-1 of the test file"),
        ("linear_top1", "Online linear at step {:.0f}: {:.2%} top-1 of the test file"),
    ):
        if column in metrics and not (average and column != "loss"):
            last = np.flatnonzero(np.isfinite(metrics[column]))[-1]
            yield line.format(metrics["step"][last], metrics[column][last])


def _evaluations(run: Path, step: Any, average: bool) -> Iterator[str]:
    """What ``widebatch evaluate`` wrote of this very step, of the encoder or of its average."""
    kinds = ("average",) if average else ("run", "exported")
    for path, report in read_reports(run):
        encoder = section(report, "encoder")
        same = encoder.get("kind") in kinds and encoder.get("step") == step
        if same and "layer" not in encoder and number_in(report.get("top1")) > 0:
            yield (
                f"{report.get('method')} ({report.get('protocol')}): {report['top1']:.2%} top-1 "
                f"of {report.get('n_test')} test images, {report.get('n_train')} labels, "
                f"{report.get('num_classes')} classes ({_code(path.name)})"
            )
