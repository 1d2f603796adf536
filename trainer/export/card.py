"""The model card: what an exported encoder is, in Markdown, filled from the run's files alone.

A number that no file of the run has is not in it: the card says "not recorded" instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files.strict_json import parse_json, read_json_file
from trainer.models.encoders import is_resnet

_UNKNOWN = "not recorded"


def model_card(run: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card's text.

    Args:
        run: its folder; metrics.jsonl and evaluation/*.json are read where they are there.
        config: of :func:`trainer.state.checkpoint.load_encoder_state`.
        facts: of the export.
    """
    metrics = _metrics(run, facts.get("step"))
    sections = [
        _header(facts),
        _data(config, facts),
        _recipe(config, facts),
        _compute(config, metrics),
        _results(run, metrics, facts),
        _limits(config, facts),
        _use(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _header(facts: Mapping[str, Any]) -> str:
    recipe = facts.get("recipe") or "a recipe of its own"
    return (
        f"# {facts['architecture']} pretrained by {_code(recipe)}\n\n"
        f"An image encoder, pretrained with Widebatch by contrastive learning, without labels: "
        f"{facts['feature_dim']} features an image. It has no classifier."
    )


def _data(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    run, data = _section(config, "run"), _section(config, "data")
    names = run.get("class_names") or []
    rows = {
        # The name alone: folders are nobody's business.
        "file": Path(str(data["train"])).name if data.get("train") else None,
        "images": run.get("num_samples"),
        "fingerprint": facts.get("data_fingerprint"),
        "classes in the file (not used for training)": len(names) or None,
    }
    return "## Data\n\n" + _table(rows)


def _recipe(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    run, optim = _section(config, "run"), _section(config, "optim")
    objective, encoder = _section(config, "objective"), _section(config, "encoder")
    preprocessing = _section(facts, "preprocessing")
    rows = {
        "objective": objective.get("name"),
        "temperature": objective.get("temperature"),
        "encoder": encoder.get("name"),
        "stem": encoder.get("stem") if is_resnet(str(encoder.get("name"))) else "its own",
        "started from": facts.get("init_from") or "random weights",
        "global batch": config.get("batch"),
        "optimizer": optim.get("name"),
        "base learning rate": optim.get("base_lr"),
        "peak learning rate": run.get("peak_lr"),
        "weight decay": optim.get("weight_decay"),
        "step of this checkpoint": facts.get("step"),
        "epochs up to it": facts.get("epoch"),
        "steps planned": run.get("total_steps"),
        "seed": config.get("seed"),
        "training crop, pixels": _section(config, "crop").get("size"),
        "evaluation": f"shorter side {preprocessing.get('resize')}, centre crop "
        f"{preprocessing.get('size')}",
    }
    return "## Recipe\n\n" + _table(rows)


def _compute(config: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    state, versions = _section(config, "checkpoint"), _section(_section(config, "run"), "versions")
    seconds = _training_seconds(config.get("batch"), metrics)
    rows = {
        "processes (when this checkpoint was written)": state.get("world_size"),
        "precision": config.get("precision"),
        "device asked for": config.get("device"),
        "strategy": _section(config, "strategy").get("name"),
        "hours of training steps": None if seconds is None else f"{seconds / 3600:.3g}",
        "torch": versions.get("torch"),
        "commit": versions.get("commit"),
    }
    return "## Compute\n\n" + _table(rows)


def _training_seconds(batch: Any, metrics: list[dict[str, Any]]) -> float | None:
    """The steps' own time; evaluation and checkpoints are not in a throughput."""
    speeds = [record.get("images_per_second") for record in metrics]
    if type(batch) is not int or not speeds or not all(_is_positive(speed) for speed in speeds):
        return None
    return sum(batch / float(speed) for speed in speeds if speed is not None)


def _results(run: Path, metrics: list[dict[str, Any]], facts: Mapping[str, Any]) -> str:
    lines = []
    if metrics and _is_positive(metrics[-1].get("loss")):
        lines.append(f"- Training loss at step {metrics[-1]['step']}: {metrics[-1]['loss']:.4g}")
    online = [record for record in metrics if _is_positive(record.get("knn_top1"))]
    if online:
        last = online[-1]
        lines.append(
            f"- Online kNN at step {last['step']}: {last['knn_top1']:.2%} top-1 of the test file"
        )
    lines += _evaluations(run / "evaluation", facts)
    return "## Results\n\n" + ("\n".join(lines) or f"{_UNKNOWN.capitalize()}.")


def _evaluations(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """What ``widebatch evaluate`` wrote of this very step."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = read_json_file(path)
        except (DataError, FileNotFoundError):
            continue  # another program's file
        encoder = _section(report, "encoder")
        same = encoder.get("kind") in ("run", "exported") and encoder.get("step") == facts["step"]
        if same and _is_positive(report.get("top1")):
            lines.append(
                f"- {report.get('method')} ({report.get('protocol')}): {report['top1']:.2%} top-1 "
                f"of {report.get('n_test')} test images, {report.get('n_train')} labels, "
                f"{report.get('num_classes')} classes ({_code(path.name)})"
            )
    return lines


def _limits(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    side = _section(facts, "preprocessing").get("size")
    lines = [
        f"- Trained on crops of {_section(config, 'crop').get('size')} pixels, evaluated at "
        f"{side}; other sizes were not tried.",
        "- It knows the data above and no other. It takes over what is one-sided in them.",
        "- Accuracy after fine-tuning is not known from this run.",
    ]
    if facts.get("init_from"):
        start = _code(facts["init_from"])
        lines.append(f"- It started from {start}; what that was trained on is not recorded.")
    step, total = facts.get("step"), _section(config, "run").get("total_steps")
    if type(step) is int and type(total) is int and step < total:
        lines.append(f"- Training is not finished: step {step} of {total}.")
    return "## Limits\n\n" + "\n".join(lines)


def _use(facts: Mapping[str, Any]) -> str:
    proof = _section(facts, "proof")
    versions = ", ".join(f"{name} {v}" for name, v in _section(proof, "versions").items())
    code = "\n".join(facts["load"])
    return (
        f"## Use\n\n```python\n{code}\n```\n\n"
        f"Features of {proof.get('images')} images computed by {proof.get('computed_by')} differed "
        f"by {proof.get('relative_difference'):.1e} of the largest feature "
        f"({proof.get('tolerance'):.0e} allowed; {versions})."
    )


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


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _table(rows: Mapping[str, Any]) -> str:
    cells = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])


def _cell(value: Any) -> str:
    if value is None:
        return _UNKNOWN
    text = f"{value:,}" if type(value) is int else f"{value:.6g}" if type(value) is float else value
    return " ".join(str(text).replace("|", "\\|").split())


def _code(text: Any) -> str:
    return "`" + str(text).replace("`", "'") + "`"
