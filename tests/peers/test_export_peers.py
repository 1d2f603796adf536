"""Exports in the libraries that they are for: timm, transformers, onnxruntime.

The proof is part of every export; here the files are loaded once more, the way a user does, by the
lines that the JSON gives.
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import transformers

from common.errors import NumericalError
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.saved_runs import RESNET18_CIFAR, save_run
from trainer.evaluation.load_encoder import load_encoder
from trainer.export import Exported, export
from trainer.export.named_models import ToTimm
from trainer.export.to_huggingface import ToHuggingFace
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.init_from import start_from

RESNET18 = EncoderConfig(name="resnet18")
RESNET50 = EncoderConfig(name="resnet50")
VIT = EncoderConfig(name="vit_b_32", image_size=64)
SMALL_VIT = EncoderConfig(name="vit_ti_4", image_size=32)
SUFFIX = {"timm": ".safetensors", "onnx": ".onnx", "huggingface": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    pack_images(folder, count=12)
    return folder


def run_of(folder: Path, encoder: EncoderConfig) -> Path:
    run = folder / f"{encoder.name.rpartition(':')[2]}-{encoder.stem}"
    if not run.exists():
        save_run(run, folder / "images.beton", encoder)
    return run


def export_to(folder: Path, encoder: EncoderConfig, file_format: str, tmp_path: Path) -> Exported:
    return export(run_of(folder, encoder), tmp_path / f"out{SUFFIX[file_format]}", file_format)


def images(encoder: EncoderConfig, count: int = 3) -> torch.Tensor:
    side = 64 if encoder is VIT else 32
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def by_its_own_instructions(done: Exported, encoder: EncoderConfig, count: int = 3) -> torch.Tensor:
    """Features by the lines in the JSON, which a user copies."""
    lines = json.loads(done.description.read_text())["load"]
    names = {"images": images(encoder, count)}
    if done.weights.suffix == ".onnx":
        names["images"] = names["images"].numpy()  # type: ignore[assignment]
    here = str(done.weights)
    code = "\n".join(line.replace(repr(done.weights.name), repr(here)) for line in lines)
    with torch.no_grad():
        exec(code, names)  # noqa: S102  (our own lines)
        if "features" not in names:
            names["features"] = names["model"].eval()(names["images"])
    return torch.as_tensor(names["features"])


@pytest.mark.parametrize(
    ("file_format", "encoder"),
    [
        ("timm", RESNET18),
        ("timm", RESNET18_CIFAR),
        ("timm", VIT),
        ("timm", SMALL_VIT),
        ("timm", EncoderConfig(name="vit_s_16", image_size=32, sees="grey")),
        ("timm", EncoderConfig(name="resnet34", norm="layer")),
        ("timm", EncoderConfig(name="resnext50_32x4d")),
        ("timm", EncoderConfig(name="wide_resnet50_2")),
        ("onnx", RESNET18),
        ("onnx", SMALL_ENCODER),
        ("onnx", VIT),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_librarys_own_model_has_our_features(
    folder: Path, tmp_path: Path, file_format: str, encoder: EncoderConfig
) -> None:
    done = export_to(folder, encoder, file_format, tmp_path)
    ours = load_encoder(str(run_of(folder, encoder))).encoder
    for count in (1, 3):
        theirs = by_its_own_instructions(done, encoder, count)
        with torch.no_grad():
            expected = ours(images(encoder, count))
        difference = (theirs - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-5
    assert done.proof.versions[{"timm": "timm", "onnx": "onnxruntime"}[file_format]]


@pytest.mark.parametrize(
    "encoder", [RESNET18, RESNET50, VIT, SMALL_VIT], ids=lambda value: value.name
)
def test_transformers_loads_the_folder_with_every_key_and_our_features(
    folder: Path, tmp_path: Path, encoder: EncoderConfig
) -> None:
    done = export_to(folder, encoder, "huggingface", tmp_path)
    model, info = transformers.AutoModel.from_pretrained(done.weights, output_loading_info=True)
    pooler = {name for name in info["missing_keys"] if name.startswith("pooler.")}
    assert set(info["missing_keys"]) == pooler  # a ViT's pooler is not of the encoder
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        output = model.eval()(pixel_values=images(encoder))
        ours = load_encoder(str(run_of(folder, encoder))).encoder(images(encoder))
    is_vit = encoder.name.startswith("vit_")
    theirs = output.last_hidden_state[:, 0] if is_vit else output.pooler_output.flatten(1)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_transformers_prepares_an_image_as_the_run_did(folder: Path, tmp_path: Path) -> None:
    done = export_to(folder, RESNET18, "huggingface", tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(done.weights)
    picture = torch.full((3, 40, 48), 128, dtype=torch.uint8)
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 5, 5], (128 / 255 - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "file_format"), [(ToTimm, "timm"), (ToHuggingFace, "huggingface")]
)
def test_a_swapped_pair_of_tensors_is_found_by_the_proof_and_nothing_is_left(
    folder: Path,
    tmp_path: Path,
    target: type,
    file_format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = target.write  # type: ignore[attr-defined]

    def swapped(self, model, tensors):  # type: ignore[no-untyped-def]
        a, b = "layer1.0.bn1.weight", "layer1.1.bn1.weight"
        return whole(self, model, {**tensors, a: tensors[b], b: tensors[a]})

    monkeypatch.setattr(target, "write", swapped)
    with pytest.raises(NumericalError, match="differ by"):
        export_to(folder, RESNET18, file_format, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch32_224"])
def test_a_run_starts_from_timms_own_weights(tmp_path: Path, name: str) -> None:
    is_vit = name.startswith("vit")
    source = timm.create_model(name, pretrained=False, **({"img_size": 64} if is_vit else {}))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    encoder = build_encoder(VIT if is_vit else RESNET18)
    matched = start_from(encoder, tmp_path / "w.safetensors")
    assert not matched.missing
    assert matched.left_over == (["head.bias", "head.weight"] if is_vit else matched.left_over)
    source.reset_classifier(0)
    pixels = images(VIT if is_vit else RESNET18)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(pixels), source.eval()(pixels))
