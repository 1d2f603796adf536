"""A run's moving average: evaluated and exported on request, refused where there is none."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.errors import CheckpointError, ConfigError
from launch.__main__ import main
from tests.trainer.runs import checkpoint_bytes, pack_images, train
from tests.trainer.saved_runs import save_run
from tests.trainer.tiny import tiny_byol_config
from trainer.evaluation.load_encoder import load_encoder
from trainer.models.encoders import EncoderConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=60)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = EncoderConfig(name="resnet18", stem="cifar")
    config = tiny_byol_config(
        data, tmp_path_factory.mktemp("runs") / "byol", steps=3, encoder=encoder
    )
    assert train(1, config) == "done"
    return config.out


def test_the_average_is_that_of_the_checkpoint_and_another_encoder(run: Path) -> None:
    kept = safetensors.torch.load(checkpoint_bytes(run)["model.safetensors"])
    itself, average = (load_encoder(f"{prefix}{run}") for prefix in ("", "average:"))
    for loaded, prefix in ((itself, "encoder."), (average, "key.encoder.")):
        for name, value in loaded.encoder.state_dict().items():
            assert torch.equal(value, kept[prefix + name])
    weights = [each.encoder.state_dict()["conv1.weight"] for each in (itself, average)]
    assert not torch.equal(*weights)
    assert average.description["kind"] == "average"


def test_export_writes_it_on_request(run: Path, tmp_path: Path) -> None:
    for name, words in (("itself", []), ("average", ["--ema"])):
        out = tmp_path / f"{name}.safetensors"
        assert main(["export", str(run), "--out", str(out), *words]) == 0
        source = run if name == "itself" else f"average:{run}"
        expected = load_encoder(str(source)).encoder.state_dict()
        found = load_encoder(str(out)).encoder.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
        assert f'"average": {"true" if words else "false"}' in out.with_suffix(".json").read_text()


def test_evaluations_of_it_have_files_of_their_own(run: Path, data: Path) -> None:
    words = ["--data.train", str(data), "--data.test", str(data), "--backend", "torchvision"]
    for source in (str(run), f"average:{run}"):
        assert main(["evaluate", "knn", source, *words]) == 0
    names = sorted(path.name for path in (run / "evaluation").glob("knn*.json"))
    assert len(names) == 2
    assert names[0].startswith("knn-average")


def test_a_run_without_one_is_refused(tmp_path: Path, data: Path) -> None:
    save_run(tmp_path / "simclr", data)
    with pytest.raises(CheckpointError, match="keeps no moving average of the encoder; BYOL"):
        load_encoder(f"average:{tmp_path / 'simclr'}")


def test_a_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="a file has one encoder; name the run's folder"):
        load_encoder(f"average:{tmp_path / 'a.safetensors'}")


def test_its_card_has_its_own_figures(run: Path, tmp_path: Path) -> None:
    for name, top1 in (("run", 0.5), ("average", 0.75)):
        report = {"method": "knn", "protocol": name, "top1": top1}
        report |= {"encoder": {"kind": name, "step": 3}}
        (run / "evaluation").mkdir(exist_ok=True)
        (run / "evaluation" / f"own-{name}.json").write_text(json.dumps(report))
    cards = []
    for words in ([], ["--ema"]):
        out = tmp_path / f"out{len(words)}.safetensors"
        assert main(["export", str(run), "--out", str(out), *words]) == 0
        cards.append(out.with_suffix(".md").read_text())
    assert "knn (run): 50.00%" in cards[0]
    assert "knn (average): 75.00%" in cards[1]
    assert "knn (average)" not in cards[0]
    assert "knn (run)" not in cards[1]
    assert "These weights are the moving average of the trained encoder's." in cards[1]
    assert "moving average" not in cards[0]
