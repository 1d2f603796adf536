"""timm's models as encoders: built by name, filled from published checkpoints, trained, handed on.

No published checkpoint can be had without network: files with the very names and shapes of DINOv2's
and DINOv3's repositories stand for them.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from common.errors import ConfigError, DataError
from tests.trainer.runs import metrics, pack_images, samples, train
from tests.trainer.saved_runs import save_run
from tests.trainer.tiny import tiny_config
from trainer.config import DataConfig, plan_run
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.load_encoder import load_encoder
from trainer.export import export
from trainer.features.online_knn import OnlineKnnConfig
from trainer.models.any_size_vit import POSITIONS
from trainer.models.encoders import EncoderConfig, build_encoder, stochastic_layers
from trainer.models.init_from import start_from
from trainer.parallel.networks import training_objective

Tensors = dict[str, torch.Tensor]
DINOV2, DINOV3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"


def _published(name: str, **options: Any) -> Tensors:
    """Of the size that it was trained at; biases are not 0."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0, **options)
    return {n: t + 0.01 * torch.randn(t.shape) for n, t in model.state_dict().items()}


def dinov2() -> Tensors:
    """As ``dinov2_vits14_reg4_pretrain.pth``: positions of the class too, and a mask's token."""
    tensors = _published(DINOV2)
    of_class = torch.randn(1, 1, 384)
    tensors["register_tokens"] = tensors.pop("reg_token")
    tensors["pos_embed"] = torch.cat([of_class, tensors["pos_embed"]], 1)
    tensors["cls_token"] = tensors["cls_token"] - of_class
    return {**tensors, "mask_token": torch.zeros(1, 384)}


def dinov3() -> Tensors:
    """As ``dinov3_vits16_pretrain.pth``."""
    tensors = {}
    for name, value in _published(DINOV3).items():
        name = name.replace("reg_token", "storage_tokens")
        for number in "12":
            name = name.replace(f"gamma_{number}", f"ls{number}.gamma")
        tensors[name] = value
    for block in range(12):
        tensors[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * 384)
        tensors[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(3 * 384)
    return {
        **tensors,
        "mask_token": torch.zeros(1, 384),
        "rope_embed.periods": torch.ones(16),
    }


@pytest.mark.parametrize("name", ["test_vit", "resnet18", "test_convnext"])
def test_it_is_timms_model_with_random_weights(name: str) -> None:
    torch.manual_seed(3)
    ours = build_encoder(EncoderConfig(name=f"timm/{name}", image_size=160)).eval()
    torch.manual_seed(3)
    theirs = timm.create_model(name, pretrained=False, num_classes=0).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.feature_dim == theirs.num_features


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
@pytest.mark.parametrize(("name", "publish"), [(DINOV2, dinov2), (DINOV3, dinov3)])
def test_a_published_transformer_goes_in_at_another_size(
    tmp_path: Path, name: str, publish: Callable[[], Tensors], prefix: str, capsys: Any
) -> None:
    published = publish()
    path = tmp_path / "published.pth"
    torch.save({prefix + n: t for n, t in published.items()}, path)
    encoder = build_encoder(EncoderConfig(name=f"timm/{name}", image_size=224)).eval()
    matched = start_from(encoder, path)
    assert matched.prefix == prefix and capsys.readouterr().out == ""
    assert not matched.missing and not matched.other_shape
    theirs = timm.create_model(name, num_classes=0, img_size=224).eval()
    convert = sys.modules[type(theirs).__module__].checkpoint_filter_fn  # type: ignore[attr-defined]
    theirs.load_state_dict(convert(published, theirs))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(encoder(images), theirs(images))


def test_positions_of_torchvisions_transformer_are_interpolated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = EncoderConfig(name="vit_ti_16", image_size=64)
    large = build_encoder(dataclasses.replace(small, image_size=96))
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file(large.state_dict(), path)
    encoder = build_encoder(small)
    with caplog.at_level("INFO"):
        assert not start_from(encoder, path).other_shape
    assert "positions of a grid of 6 interpolated to one of 4" in caplog.text
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():  # the larger one interpolates them itself
        torch.testing.assert_close(encoder.eval()(images), large.eval()(images))


def test_any_number_of_processes_has_the_same_run_and_timm_takes_its_export(tmp_path: Path) -> None:
    data = pack_images(tmp_path)
    encoder = EncoderConfig(name="timm/test_vit", image_size=32)
    configs = [
        tiny_config(data, tmp_path / f"w{world_size}", encoder=encoder, precision="fp64")
        for world_size in (1, 2)
    ]
    for world_size, config in enumerate(configs, 1):
        assert train(world_size, config) == "done"
    one, two = (config.out for config in configs)
    assert samples(one) == samples(two)
    for mine, other in zip(metrics(one), metrics(two), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-8)
    done = export(one, tmp_path / "encoder.safetensors", "timm")
    assert done.proof.relative_difference < 1e-9
    theirs = timm.create_model("test_vit", num_classes=0, img_size=32)
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "encoder.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "timm/vit_small_patch14_dino2"}, "did you mean timm/vit_small_patch14_dinov2"),
        ({"name": "timm/hf-hub:someone/something"}, "timm has no model"),
        ({"name": "timm/test_vit", "image_size": 30}, "at 30 pixels .* set --encoder.image-size"),
        ({"name": "timm/resnet18", "stem": "cifar"}, "--encoder.stem cifar is for ResNets"),
        ({"name": "timm/efficientnet_b0", "norm": "layer"}, "is a BatchNormAct2d"),
        ({"name": "timm/resnet18.of_nobody"}, "timm/resnet18.of_nobody: Invalid pretrained tag"),
        ({"name": "timm/test_nfnet", "sees": "grey"}, "does not begin with a plain convolution"),
    ],
)
def test_what_timm_does_not_have_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(EncoderConfig(**settings))


def test_batch_norms_that_do_more_are_refused_on_one_process_too(tmp_path: Path) -> None:
    encoder = EncoderConfig(name="timm/test_efficientnet", image_size=32)
    config = tiny_config(tmp_path / "x.beton", tmp_path / "run", encoder=encoder)
    with pytest.raises(ConfigError, match=r"is a BatchNormAct2d.* or --no-sync-batch-norm"):
        training_objective(config, 1, None, 100)
    training_objective(dataclasses.replace(config, sync_batch_norm=False), 1, None, 100)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "vit_ti_16"])
def test_hostile_positions_are_refused_in_words(tmp_path: Path, name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name, image_size=32))
    own = "pos_embed" if name.startswith("timm/") else POSITIONS
    tensors = encoder.state_dict()
    for number, positions in enumerate(
        (
            torch.zeros(1).expand(1, 1 + 30000**2, 192),
            torch.zeros(3, 197, 192),
            torch.zeros(0, 197, 192),
            torch.zeros(1, 197, 192).to_sparse(),
            torch.zeros(1, 197, 192, device="meta"),
        )
    ):
        path = tmp_path / f"{number}.pth"
        torch.save({**tensors, own: positions}, path)
        with contextlib.suppress(ConfigError, DataError):
            assert start_from(encoder, path).other_shape, number
    torch.save({**tensors, "." * 1_000_000: torch.zeros(1)}, tmp_path / "dots.pth")
    assert not start_from(encoder, tmp_path / "dots.pth").missing


def test_layers_of_timms_that_draw_are_known() -> None:
    swin = build_encoder(EncoderConfig(name="timm/swin_tiny_patch4_window7_224"))
    assert "layers.3.blocks.1.drop_path1" in stochastic_layers(swin)
    assert not stochastic_layers(build_encoder(EncoderConfig(name="timm/test_vit")))


def test_a_transformer_of_one_size_refuses_another_before_the_work(tmp_path: Path) -> None:
    data, encoder = pack_images(tmp_path, 24), EncoderConfig(name="timm/test_vit", image_size=32)
    save_run(tmp_path / "run", data, encoder)
    with pytest.raises(ConfigError, match="timm/test_vit takes no images of 48 pixels; --size 32"):
        Job(JobConfig(source=str(tmp_path / "run"), size=48, device="cpu"))
    config = tiny_config(data, tmp_path / "other", encoder=encoder, knn=OnlineKnnConfig(size=48))
    config = dataclasses.replace(config, data=DataConfig(train=(data,), test=(data,)))
    with pytest.raises(ConfigError, match=r"--knn.size 48: timm/test_vit takes no images"):
        plan_run(config, 24, 1)


def test_an_exported_file_may_not_name_timms(tmp_path: Path) -> None:
    data = pack_images(tmp_path, 24)
    save_run(tmp_path / "run", data, EncoderConfig(name="resnet18"))
    export(tmp_path / "run", tmp_path / "r18.safetensors")
    told = tmp_path / "r18.json"
    told.write_text(told.read_text().replace('"name": "resnet18"', '"name": "timm/resnet18"'))
    with pytest.raises(DataError, match="torchvision's architectures only"):
        load_encoder(str(tmp_path / "r18.safetensors"))


def test_without_timm_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        build_encoder(EncoderConfig(name="timm/resnet18"))
