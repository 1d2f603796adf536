"""The model card has what the run's files have, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import SMALL, saved_run
from trainer.export import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    return saved_run(folder, pack_images(folder, count=12), SMALL)


def card_of(run: Path, folder: Path) -> str:
    return export(run, folder / "out.safetensors").card.read_text()


def test_what_no_file_of_the_run_has_is_not_recorded(tmp_path: Path, run: Path) -> None:
    card = card_of(run, tmp_path)
    for heading in ("Data", "Recipe", "Compute", "Results", "Limits", "Use"):
        assert f"\n## {heading}\n" in card
    assert "| images | not recorded |" in card
    assert "| hours of training steps | not recorded |" in card
    assert "## Results\n\nNot recorded." in card
    assert "| step of this checkpoint | 6 |" in card
    assert str(run.parent) not in card  # nobody's folders
    assert "| started from | random weights |" in card
    assert "load_file('out.safetensors')" in card


def test_results_and_compute_come_from_metrics_and_evaluations_of_this_very_step(
    tmp_path: Path, run: Path
) -> None:
    records = [
        {"step": step, "loss": 3.5 - step / 4, "images_per_second": 12.0} for step in range(1, 9)
    ]
    records[5] |= {"knn_top1": 0.25, "knn_best_top1": 0.25}
    records[7] |= {"knn_top1": 0.99, "knn_best_top1": 0.99}  # after the exported step 6
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    evaluation = {
        "method": "knn", "protocol": "weighted-knn", "top1": 0.5, "n_train": 12, "n_test": 4,
        "num_classes": 3, "encoder": {"kind": "run", "step": 6},
    }  # fmt: skip
    (run / "evaluation").mkdir()
    others = [
        {**evaluation, "top1": 0.75, "encoder": {"kind": "run", "step": 3}},
        {**evaluation, "top1": 0.125, "encoder": {"kind": "untrained", "step": 6}},
    ]
    for name, report in zip("abc", [evaluation, *others]):
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(report))
    (run / "evaluation" / "notes.json").write_text("not JSON")
    card = card_of(run, tmp_path)
    assert "Training loss at step 6: 2" in card
    assert "Online kNN at step 6: 25.00% top-1" in card
    assert "- knn (weighted-knn): 50.00% top-1 of 4 test images, 12 labels, 3 classes" in card
    assert "| hours of training steps | 0.00333 |" in card  # 6 steps of 24 images at 12 a second
    for absent in ("99.00%", "75.00%", "12.50%"):
        assert absent not in card


def test_a_card_can_go_elsewhere_but_not_over_the_weights(tmp_path: Path, run: Path) -> None:
    done = export(run, tmp_path / "out.safetensors", card=tmp_path / "cards" / "model.md")
    assert done.card.read_text().startswith("# shufflenet_v2_x0_5 pretrained by")
    assert not (tmp_path / "out.md").exists()
    with pytest.raises(ConfigError, match="another file of this export"):
        export(run, tmp_path / "b.safetensors", card=tmp_path / "b.json")
    with pytest.raises(ConfigError, match=re.escape("README.md")):
        export(run, tmp_path / "hf", "huggingface", card=tmp_path / "c.md")
