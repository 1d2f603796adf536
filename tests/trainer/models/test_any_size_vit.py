"""A vision transformer at sizes that it was not built for."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import VisionTransformer

from common.errors import ConfigError
from data_pipeline.crops import CropConfig
from tests.trainer.plans import small
from trainer.config import plan_run
from trainer.models.any_size_vit import resized_positions, take_any_size
from trainer.models.encoders import EncoderConfig, build_encoder, takes_size
from trainer.objectives.dino import DINOConfig

SIDE, PATCH = 32, 8


def _vit() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(SIDE, PATCH, 2, 2, 32, 64).eval()
    vit.heads = nn.Identity()  # type: ignore[assignment]
    return vit


def test_at_its_own_size_it_is_torchvisions_to_the_bit() -> None:
    images = torch.randn(3, 3, SIDE, SIDE)
    plain, any_size = _vit(), _vit()
    take_any_size(any_size)
    assert torch.equal(any_size(images), plain(images))
    assert any_size.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("after", [1, 2, 3, 6, 11])
def test_positions_are_torchs_bicubic_interpolation(after: int) -> None:
    positions = torch.randn(1, 1 + 4 * 4, 7, dtype=torch.float64)
    grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    found = resized_positions(positions, after)
    assert torch.equal(found[:, 0], positions[:, 0])
    torch.testing.assert_close(found[:, 1:], expected.flatten(2).transpose(1, 2))


def test_another_size_has_gradients_and_survives_a_copy() -> None:
    vit = _vit()
    take_any_size(vit)
    twin = copy.deepcopy(vit)
    with torch.no_grad():
        twin.encoder.pos_embedding.add_(1)
    images = torch.randn(2, 3, 16, 16)
    features = vit(images)
    assert features.shape == (2, 32)
    features.square().sum().backward()
    assert vit.encoder.pos_embedding.grad.abs().sum(2).gt(0).all()
    assert not torch.allclose(twin(images), features)


def test_which_sizes_go_beside_the_one_it_was_built_for() -> None:
    vit = EncoderConfig(name="vit_s_16", image_size=224)
    assert [takes_size(vit, side) for side in (224, 96, 100)] == [True, True, False]
    maxvit = EncoderConfig(name="maxvit_t", image_size=224)
    assert [takes_size(maxvit, side) for side in (224, 96)] == [True, False]
    assert takes_size(EncoderConfig(name="resnet18"), 37)
    assert isinstance(build_encoder(vit), VisionTransformer)


def test_small_views_that_patches_do_not_divide_are_refused() -> None:
    config = small(encoder=EncoderConfig(name="vit_ti_8", image_size=32), batch=16)
    for side, fits in ((16, True), (20, False)):
        objective = DINOConfig(small_crop=CropConfig(size=side))
        config = dataclasses.replace(config, objective=objective)
        if fits:
            plan_run(config, 1000, 1)
            continue
        with pytest.raises(ConfigError, match=r"vit_ti_8 takes no images of 20 pixels"):
            plan_run(config, 1000, 1)


def test_an_image_that_patches_do_not_divide_is_refused_and_not_cropped() -> None:
    vit = _vit()
    take_any_size(vit)
    for height, width in ((20, 20), (16, 24)):
        with pytest.raises(ConfigError, match=f"images of {height} x {width} pixels: .* of 8 div"):
            vit(torch.randn(1, 3, height, width))
