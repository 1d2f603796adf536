"""--init-from: weights of elsewhere go in, what matched is said, too little is refused."""

import argparse
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from common.errors import ConfigError, DataError
from tests.trainer.runs import pack_images, train
from tests.trainer.saved_runs import save_run
from tests.trainer.tiny import tiny_config, tiny_mocov3_config
from trainer.export import export
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.init_from import start_from
from trainer.models.tensor_names import timm_vit
from trainer.parallel.networks import build_objective
from trainer.state.checkpoint import load_encoder_state

RESNET18 = EncoderConfig(name="resnet18")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained() -> Tensors:
    """What torchvision would publish: with its classifier."""
    torch.manual_seed(1)
    return dict(torchvision.models.resnet18(weights=None).state_dict())


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def moco_v3(tensors: Tensors) -> dict:
    """As facebookresearch/moco-v3's main_moco.py saves it."""
    both = [with_prefix(tensors, f"module.{which}_encoder.") for which in ("base", "momentum")]
    both[1] = {name: value + 1 for name, value in both[1].items()}
    head = {"module.predictor.0.weight": torch.ones(2, 2)}
    return {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": both[0] | both[1] | head,
        "optimizer": {"state": {0: {"mu": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": 65536.0},
    }


def numbered(name: str) -> str:
    """As in ``nn.Sequential(*resnet.children())``."""
    layers = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4", "", "fc")
    layer, _, rest = name.partition(".")
    return f"{layers.index(layer)}.{rest}"


CONTAINERS: dict[str, Callable[[Tensors], object]] = {
    "torchvision": lambda tensors: tensors,
    "converted SimCLR": lambda tensors: {"state_dict": tensors},
    "MoCo v2": lambda tensors: {
        "arch": "resnet18",
        "state_dict": with_prefix(tensors, "module.encoder_q."),
    },
    "MoCo v3": moco_v3,
    "DINO": lambda tensors: {"teacher": with_prefix(tensors, "backbone.")},
    "torch.compile": lambda tensors: with_prefix(tensors, "_orig_mod."),
    "DDP of torch.compile": lambda tensors: with_prefix(tensors, "module._orig_mod."),
    "compiled and sharded within": lambda tensors: {
        name.replace("layer1.", "layer1._orig_mod.").replace(
            "layer2.0.", "layer2.0._fsdp_wrapped_module._checkpoint_wrapped_module."
        ): value
        for name, value in tensors.items()
    },
    "DeepSpeed": lambda tensors: {
        "module": with_prefix(tensors, "model.encoder."),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
        "ds_config": {"train_batch_size": 8},
    },
    "lightly": lambda tensors: {
        "state_dict": {
            **{"backbone." + numbered(name): value for name, value in tensors.items()},
            "backbone_momentum.0.weight": torch.zeros(64, 3, 7, 7),
        }
    },
    "deep": lambda tensors: with_prefix(tensors, "module.learner.online_network.net.trunk."),
    "options of a script": lambda tensors: {
        "model": tensors,
        "args": argparse.Namespace(arch="resnet18", lr=0.1, betas=(0.9, 0.999)),
    },
    "old torch": lambda tensors: {
        name: value for name, value in tensors.items() if "num_batches" not in name
    },
    "half precision": lambda tensors: {"model": {n: v.half() for n, v in tensors.items()}},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_weights_of_elsewhere_fill_the_encoder(tmp_path: Path, trained: Tensors, kind: str) -> None:
    path = tmp_path / "weights.pth.tar"
    torch.save(CONTAINERS[kind](trained), path)
    encoder = build_encoder(RESNET18)
    matched = start_from(encoder, path)
    assert not matched.missing
    assert not matched.other_shape
    assert matched.matched_values == 1
    assert any(name.endswith(("fc.weight", "9.weight")) for name in matched.left_over)
    exact = 1e-3 if kind == "half precision" else 0
    for name, value in encoder.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, trained[name], rtol=exact, atol=exact)


@pytest.mark.slow
def test_transformers_come_under_timms_names_as_moco_v3s_do(tmp_path: Path) -> None:
    config = EncoderConfig(name="vit_b_32", image_size=64)
    source, encoder = build_encoder(config), build_encoder(config)
    tensors = {timm_vit(name): value for name, value in source.state_dict().items()}
    torch.save({"state_dict": with_prefix(tensors, "module.base_encoder.")}, tmp_path / "w.pth")
    matched = start_from(encoder, tmp_path / "w.pth")
    assert (matched.prefix, matched.missing) == ("state_dict.module.base_encoder.", [])
    assert torch.equal(encoder.state_dict()["class_token"], source.state_dict()["class_token"])


def test_our_own_exports_and_checkpoints_are_taken(tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run", pack_images(tmp_path, count=12), RESNET18)
    export(tmp_path / "run", tmp_path / "out.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    for path in (tmp_path / "out.safetensors", checkpoint):
        encoder = build_encoder(RESNET18)
        start_from(encoder, path)
        assert torch.equal(encoder.state_dict()["conv1.weight"], saved.state_dict()["conv1.weight"])


def test_what_is_missing_and_of_another_shape_is_said(
    tmp_path: Path, trained: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    """The CIFAR stem under ImageNet's weights: one small tensor stays random."""
    caplog.set_level("INFO")
    kept = {name: value for name, value in trained.items() if name != "bn1.bias"}
    safetensors.torch.save_file(kept, tmp_path / "w.safetensors")
    encoder = build_encoder(EncoderConfig(name="resnet18", stem="cifar"))
    matched = start_from(encoder, tmp_path / "w.safetensors")
    assert matched.missing == ["bn1.bias"]
    assert matched.other_shape == ["conv1.weight (64, 3, 7, 7), here (64, 3, 3, 3)"]
    assert set(matched.left_over) == {"fc.weight", "fc.bias"}
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2
    assert "bn1.bias" in warned[0]
    assert "98 of 100 tensors" in caplog.text


@pytest.mark.parametrize("architecture", ["resnet34", "resnet50", "shufflenet_v2_x0_5"])
def test_weights_of_another_architecture_are_refused_and_nothing_is_filled(
    tmp_path: Path, trained: Tensors, architecture: str
) -> None:
    torch.save(trained, tmp_path / "w.pth")
    encoder = build_encoder(EncoderConfig(name=architecture))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ConfigError, match=r"90% must match|none of its tensors") as caught:
        start_from(encoder, tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[n]) for n, v in encoder.state_dict().items())


def test_of_two_networks_the_one_that_is_handed_on_is_taken(
    tmp_path: Path, trained: Tensors
) -> None:
    other = {name: value + 1 for name, value in trained.items()}
    for second, first in (
        ("module.encoder_k.", "module.encoder_q."),
        ("student.module.backbone.", "teacher.backbone."),
        ("backbone_momentum.", "backbone."),
        ("state_dict_ema.", "state_dict."),
    ):
        content = {**with_prefix(other, second), **with_prefix(trained, first)}
        torch.save(content, tmp_path / "w.pth")
        encoder = build_encoder(RESNET18)
        assert start_from(encoder, tmp_path / "w.pth").prefix == first
        assert torch.equal(encoder.state_dict()["bn1.weight"], trained["bn1.weight"])


def test_names_that_are_nobodys_are_not_taken_for_another_architecture(
    tmp_path: Path, trained: Tensors
) -> None:
    odd = {f"\x1b[1m{number}": value for number, value in enumerate(trained.values())}
    torch.save(odd, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"none of its tensors .* rename its tensors") as caught:
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")
    assert str(caught.value).isprintable()


def test_what_stands_in_the_way_beside_the_tensors_is_named(
    tmp_path: Path, trained: Tensors
) -> None:
    """torch's own message has pages, and codes for a terminal."""
    for zipped in (True, False):
        content = {"model": trained, "folder": Path("/data")}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(DataError, match=r"it holds pathlib\.\w*Path; .* alone") as caught:
            start_from(build_encoder(RESNET18), tmp_path / "w.pth")
        assert str(caught.value).isprintable()


def test_dictionaries_without_end_are_refused(tmp_path: Path) -> None:
    endless: dict[str, object] = {"lr": 0.1}
    endless["again"] = endless
    torch.save(endless, tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no tensors by name"):
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("run-by-the-file"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": {"x": Evil()}},
            r"without running code of the file: it holds \S+; where you trust",
        ),
        ({"epoch": 3}, "holds no tensors by name"),
        ([torch.ones(2)], "holds no tensors by name"),
    ],
    ids=["code", "no tensors", "a list"],
)
def test_code_and_files_without_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value / 0, "not finite in conv1.weight"),
        (lambda value: value.to_sparse(), "no dense tensor"),
        (lambda value: value.long(), "no dense tensor"),
        (lambda value: value.to("meta"), "no dense tensor"),
    ],
    ids=["inf", "sparse", "integers", "meta"],
)
def test_values_that_are_no_weights_are_refused(
    tmp_path: Path, trained: Tensors, spoil: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    torch.save({**trained, "conv1.weight": spoil(trained["conv1.weight"])}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=message):
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")


FOREIGN = r"w\.pth: damaged, or not in torch.save's own format; .* a model's weights$"


@pytest.mark.parametrize("cut", [0, 1000, -1000])
def test_damaged_files_are_refused_by_one_line(tmp_path: Path, trained: Tensors, cut: int) -> None:
    torch.save(trained, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:cut])
    with pytest.raises(DataError, match=FOREIGN) as caught:
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil()))  # as nothing of torch's
    with pytest.raises(DataError, match=FOREIGN):
        start_from(build_encoder(RESNET18), tmp_path / "w.pth")
    with pytest.raises(DataError, match="cannot be read"):
        start_from(build_encoder(RESNET18), tmp_path / "nowhere.pth")


def test_a_run_starts_from_the_file_and_changes_nothing_else_that_is_random(
    tmp_path: Path, trained: Tensors
) -> None:
    safetensors.torch.save_file(trained, tmp_path / "w.safetensors")
    config = dataclasses.replace(
        tiny_config(tmp_path / "x", tmp_path / "run"), init_from=tmp_path / "w.safetensors"
    )
    plain = build_objective(config).state_dict()
    filled = build_objective(config, config.init_from).state_dict()
    assert torch.equal(filled["encoder.conv1.weight"], trained["conv1.weight"])
    heads = [name for name in plain if not name.startswith("encoder.")]
    assert heads
    assert all(torch.equal(plain[name], filled[name]) for name in heads)


def test_mocos_key_encoder_starts_from_the_file_too(tmp_path: Path, trained: Tensors) -> None:
    safetensors.torch.save_file(trained, tmp_path / "w.safetensors")
    config = tiny_mocov3_config(tmp_path / "x", tmp_path / "run")
    filled = build_objective(config, tmp_path / "w.safetensors").state_dict()
    for prefix in ("encoder.", "key.encoder."):
        assert torch.equal(filled[f"{prefix}conv1.weight"], trained["conv1.weight"])


@pytest.mark.slow
def test_a_resumed_run_needs_the_file_no_more(tmp_path: Path, trained: Tensors) -> None:
    data = pack_images(tmp_path)
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(trained, weights)
    config = tiny_config(data, tmp_path / "run", steps=4, init_from=weights)
    assert train(1, config, stop_at=2) == "stopped"
    weights.unlink()
    assert train(1, config) == "done"
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["init_from"] == str(weights)
    assert load_encoder_state(tmp_path / "run")[1]["checkpoint"]["step"] == 4
