"""Formats other than torchvision's, as far as they need no library but torch.

What the libraries themselves make of the files is in tests/peers/test_export_peers.py.
"""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from common.errors import ConfigError, NumericalError
from tests.trainer.export.detectron2_backbone import Backbone
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.saved_runs import RESNET18_CIFAR, SMALL, saved_run
from trainer.evaluation.load_encoder import Preprocessing, load_encoder
from trainer.export import export, write
from trainer.export.named_models import ToTimm
from trainer.export.programs import ToTorchExport
from trainer.export.target import Features, Target, Tensors
from trainer.export.to_detectron2 import ToDetectron2
from trainer.export.to_huggingface import ToHuggingFace
from trainer.export.write import atomic_folder
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.tensor_names import detectron2_resnet

RESNET18 = EncoderConfig(name="resnet18")
AT_32 = Preprocessing(size=32, resize=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return saved_run(tmp_path_factory.mktemp("resnet18"), data, RESNET18)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return saved_run(tmp_path_factory.mktemp("small"), data, SMALL_ENCODER)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- detectron2 ---


def test_detectron2_names_every_tensor_of_a_resnet_but_the_counters(
    tmp_path: Path, run: Path
) -> None:
    done = export(run, tmp_path / "out.safetensors", "detectron2")
    assert done.proof.relative_difference <= 1e-9
    assert "not detectron2 itself" in done.proof.computed_by
    settings = done.facts["detectron2"]["settings"]
    assert settings["MODEL.RESNETS.DEPTH"] == 18
    assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert settings["INPUT.FORMAT"] == "RGB"
    assert settings["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
    ],
)
def test_detectron2s_names_are_those_of_its_own_converter(ours: str, theirs: str) -> None:
    assert detectron2_resnet(ours) == theirs


def written_and_loaded(name: str) -> tuple[nn.Module, Backbone]:
    """An encoder, and detectron2's backbone with all tensors of the file that was made of it."""
    encoder = build_encoder(EncoderConfig(name=name)).double().eval()
    target = ToDetectron2(EncoderConfig(name=name), AT_32)
    content = target.write(encoder, dict(encoder.state_dict()))[""]
    backbone = Backbone(name).double().eval()
    backbone.load_state_dict(safetensors.torch.load(content))
    with torch.no_grad():
        ours = encoder(images().double())
        torch.testing.assert_close(target.load(content)(images().double()), ours)
    return encoder, backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_detectron2s_backbone_takes_every_tensor_and_computes_the_same(name: str) -> None:
    encoder, backbone = written_and_loaded(name)
    with torch.no_grad():
        ours, theirs = encoder(images().double()), backbone(images().double())
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


def test_detectron2s_stride_in_the_1x1_would_be_seen() -> None:
    """The comparison is no tautology: the one setting easily wrong changes the features."""
    encoder, backbone = written_and_loaded("resnet50")
    block = backbone.get_submodule("res3.0")
    block.get_submodule("conv1").stride, block.get_submodule("conv2").stride = (2, 2), (1, 1)  # type: ignore[assignment]
    with torch.no_grad():
        ours, theirs = encoder(images().double()), backbone(images().double())
        assert not torch.allclose(theirs, ours, rtol=1e-3)


# --- torch.export ---


def test_torch_export_gives_the_features_of_any_number_of_images_without_our_code(
    tmp_path: Path, small_run: Path
) -> None:
    """Of a user's own encoder too, whose architecture no library knows."""
    done = export(small_run, tmp_path / "out.pt2", "torch-export")
    assert names(tmp_path) == ["out.json", "out.md", "out.pt2"]
    model = torch.export.load(tmp_path / "out.pt2").module()
    ours = load_encoder(str(small_run)).encoder
    for count in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(model(images(count)), ours(images(count)))
    assert done.proof.relative_difference <= done.proof.tolerance <= 1e-4
    assert done.proof.dtype == "float32"
    with pytest.raises(NotImplementedError):  # as docs/finetune.md says
        model.train()
    with pytest.raises(AssertionError, match="Guard failed"):
        model(images()[..., :16, :16])


def test_an_encoder_that_cannot_be_traced_is_refused_by_one_line() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(ConfigError, match="torch cannot export") as caught:
        ToTorchExport(SMALL_ENCODER, AT_32).write(Asks(), {})
    assert "\n" not in str(caught.value)


# --- what is refused ---


@pytest.mark.parametrize(
    ("target", "encoder", "reason"),
    [
        (ToHuggingFace, RESNET18_CIFAR, "7x7 stem"),
        (ToHuggingFace, SMALL, "no configuration"),
        (ToHuggingFace, EncoderConfig(name="resnet18", norm="layer"), "its ResNet has BatchNorm"),
        (ToHuggingFace, EncoderConfig(name="wide_resnet50_2"), "no configuration"),
        (ToTimm, SMALL, "no counterpart"),
        (ToDetectron2, RESNET18_CIFAR, "7x7"),
        (ToDetectron2, EncoderConfig(name="vit_b_16"), "cannot be vit_b_16"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_what_a_library_cannot_hold_is_refused_with_the_reason(
    target: type[Target], encoder: EncoderConfig, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        target(encoder, AT_32)
    assert f"--format {target.name}" in str(caught.value)


def test_a_transformer_has_no_batch_norm_to_be_refused_for() -> None:
    ToHuggingFace(EncoderConfig(name="vit_b_16", norm="layer"), AT_32)


def test_a_refusal_names_those_formats_that_do_hold_the_encoder(tmp_path: Path, data: Path) -> None:
    small = EncoderConfig(name="resnet8", stem="cifar")
    with pytest.raises(ConfigError, match=r"; take --format onnx or torch-export$"):
        export(saved_run(tmp_path, data, small), tmp_path / "out.safetensors")


def test_the_cifar_stem_at_stride_two_is_the_one_that_torchvision_is_told_to_have(
    tmp_path: Path, data: Path
) -> None:
    """The proof compares features: a stem of stride 1 has other ones."""
    encoder = EncoderConfig(name="resnet18", stem="cifar-stride2")
    done = export(saved_run(tmp_path, data, encoder), tmp_path / "out.safetensors")
    assert any("stride=2" in line for line in done.facts["load"])


@pytest.mark.parametrize(
    ("file_format", "out", "message"),
    [
        ("onnx", "out.safetensors", "NAME.onnx"),
        ("torch-export", "out.pt", "NAME.pt2"),
        ("timm", "out.onnx", "NAME.safetensors"),
        ("tensorflow", "out", "choose from torchvision, timm"),
    ],
)
def test_another_formats_suffix_is_refused_before_anything_is_read(
    tmp_path: Path, file_format: str, out: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(Path("no run"), tmp_path / out, file_format)


@pytest.mark.parametrize(
    ("file_format", "out", "module", "package"),
    [
        ("timm", "out.safetensors", "timm", "timm"),
        ("huggingface", "out", "transformers", "transformers"),
        ("onnx", "out.onnx", "onnx", "onnx onnxscript onnxruntime"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_pip_command(
    tmp_path: Path,
    run: Path,
    file_format: str,
    out: str,
    module: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"python -m pip install {package}$"):
        export(run, tmp_path / out, file_format)
    assert names(tmp_path) == []


def test_other_formats_are_not_taken_for_weights_of_our_own(tmp_path: Path, run: Path) -> None:
    export(run, tmp_path / "out.safetensors", "detectron2")
    with pytest.raises(Exception, match="'widebatch-export'"):
        load_encoder(str(tmp_path / "out.safetensors"))


# --- a folder ---


class _Folder(ToHuggingFace):
    """transformers' files without transformers: what a folder's way into place needs of it."""

    packages = ()

    def load(self, written: Path | bytes) -> Features:
        assert isinstance(written, Path)
        assert (written / "model.safetensors").stat().st_size > 1 << 20
        return self.features

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        def features(pixels: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = model(pixels)  # float64 by then, as the proof makes it
            return result

        self.features: Features = features
        return super().write(model, tensors)


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(write.TARGETS, "huggingface", _Folder)


@pytest.mark.usefixtures("folders")
def test_a_folder_appears_whole_with_its_card_and_proof(tmp_path: Path, run: Path) -> None:
    done = export(run, tmp_path / "out", "huggingface")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
        "widebatch.json",
    ]  # fmt: skip
    facts = json.loads(done.description.read_text())
    assert facts["proof"]["images"] == 8
    assert set(facts["sha256"]) == {
        "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


@pytest.mark.usefixtures("folders")
def test_a_failing_proof_leaves_no_folder(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Folder, "load", lambda *_: lambda pixels: pixels.flatten(1)[:, :512])
    with pytest.raises(NumericalError, match="differ by"):
        export(run, tmp_path / "out", "huggingface")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("folders")
def test_force_replaces_an_exports_folder_and_no_other(tmp_path: Path, run: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    export(run, out, "huggingface", which="best")
    with pytest.raises(ConfigError, match="--force"):
        export(run, out, "huggingface")
    export(run, out, "huggingface", force=True)
    assert json.loads((out / "widebatch.json").read_text())["step"] == 6
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="no export of ours"):
        export(run, precious, "huggingface", force=True)
    assert names(tmp_path) == ["out", "precious"]
    assert names(precious) == ["thesis.tex"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as first:
        (first / "a").write_bytes(b"old")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space"), atomic_folder(out) as second:
        (second / "a").write_bytes(b"new")
    assert names(tmp_path) == ["out"]
    assert (out / "a").read_bytes() == b"old"


def test_every_format_has_its_own_name_and_says_who_computes() -> None:
    assert len(write.TARGETS) == 6
    assert all(target.built_by for target in write.TARGETS.values())
