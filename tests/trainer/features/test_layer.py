"""Features of a layer: as torchvision's own extraction of them gives, whatever follows it."""

import copy
from pathlib import Path

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import Encoder, VisionTransformer

from common.errors import ConfigError
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import RESNET18_CIFAR, save_run
from trainer.evaluation.knn import KnnConfig, knn
from trainer.features.layer import LayerFeatures
from trainer.models.encoders import EncoderConfig, build_encoder

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "layer", "node"),
    [
        (RESNET18_CIFAR, "layer2", "layer2.1.relu_1"),
        (RESNET18_CIFAR, "layer4", "layer4.1.relu_1"),
        (EncoderConfig(name="convnext_tiny"), "features.3", "features.3.2.add"),
        (
            EncoderConfig(name="vit_ti_8", image_size=32),
            "encoder.layers.encoder_layer_3",
            "encoder.layers.encoder_layer_3.add_1",
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_they_are_those_that_torchvision_extracts(
    config: EncoderConfig, layer: str, node: str
) -> None:
    encoder = build_encoder(config).eval()
    plain = copy.deepcopy(encoder)
    if isinstance(
        plain, VisionTransformer
    ):  # ours asks for an image's size, which a tracer forbids
        plain.__class__, plain.encoder.__class__ = VisionTransformer, Encoder
    theirs = create_feature_extractor(plain, {node: "rows"})(IMAGES)["rows"]
    theirs = theirs.mean((2, 3)) if theirs.ndim == 4 else theirs[:, 0]
    assert torch.equal(LayerFeatures(encoder, layer)(IMAGES), theirs)


@torch.no_grad()
def test_what_follows_does_not_write_into_them() -> None:
    """A ReLU in place comes after this BatchNorm."""
    encoder = build_encoder(RESNET18_CIFAR).eval()
    expected = encoder.get_submodule("bn1")(encoder.get_submodule("conv1")(IMAGES)).mean((2, 3))
    found = LayerFeatures(encoder, "bn1")(IMAGES)
    assert torch.equal(found, expected)
    assert (found < 0).any()


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer5"), ("resnet18", ""), ("swin_t", "features.1")]
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(name: str, layer: str) -> None:
    with pytest.raises(ConfigError, match=r"no such layer of maps; its parts are \w+, "):
        LayerFeatures(build_encoder(EncoderConfig(name=name)), layer)


def test_an_evaluation_says_of_which_layer_it_is(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=30)
    save_run(tmp_path / "run", data)
    reports = {}
    for layer in ("", "layer2", "layer3.0"):
        config = KnnConfig(
            source=str(tmp_path / "run"), train=(data,), test=(data,), k=(3,), layer=layer
        )
        reports[layer] = knn(config)
    encoders = {layer: report["encoder"] for layer, report in reports.items() if report}
    assert [each["feature_dim"] for each in encoders.values()] == [512, 128, 256]
    assert [each.get("layer") for each in encoders.values()] == [None, "layer2", "layer3.0"]
