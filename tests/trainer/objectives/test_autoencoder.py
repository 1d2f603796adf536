"""Autoencoders: what is given, what is compared, and that the decoder fits any encoder's maps."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from common.errors import ConfigError
from common.randomness import Stream
from data_pipeline.augment import IMAGENET_STD, AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.objectives.autoencoder import Autoencoder, AutoencoderConfig
from trainer.objectives.base import Given, Inputs, Outputs
from trainer.objectives.parts.decoder import Decoder, LastMaps
from trainer.objectives.parts.draws import normal_draws
from trainer.objectives.vae import VAE, VAEConfig

SIDE = 32


def _objective(**settings: object) -> Autoencoder:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    return Autoencoder(encoder, AutoencoderConfig(**settings), Given(side=SIDE))  # type: ignore[arg-type]


def _inputs(images: torch.Tensor, step: int = 3) -> Inputs:
    ids = torch.arange(len(images)) + 5
    return Inputs((images[None],), ids, torch.ones_like(ids, dtype=torch.bool), step)


@pytest.mark.parametrize(
    ("name", "stem", "maps"),
    [
        ("resnet8", "cifar", (64, 8)),
        ("resnet18", "cifar", (512, 4)),
        ("convnext_tiny", "imagenet", (768, 2)),
        ("vit_ti_16", "imagenet", (192, 4)),
    ],
)
def test_the_last_maps_are_those_before_the_pooling(
    name: str, stem: str, maps: tuple[int, int]
) -> None:
    side = 64 if stem == "imagenet" else SIDE
    encoder = build_encoder(EncoderConfig(name=name, stem=stem, image_size=side))  # type: ignore[arg-type]
    last = LastMaps(encoder, side)
    assert (last.channels, last.side) == maps
    images = torch.randn(2, 3, side, side)
    encoder.eval()
    found = last(encoder, images)
    assert found.shape == (2, maps[0], maps[1], maps[1])
    if stem != "imagenet":  # the others have something after it
        assert torch.allclose(found.mean((2, 3)), encoder(images), atol=1e-5)
    encoder.train()
    last(encoder, images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_an_encoder_without_maps_is_refused() -> None:
    encoder = build_encoder(EncoderConfig(name="vit_b_32", image_size=32))
    with pytest.raises(ConfigError, match="decodes images from an encoder's maps"):
        LastMaps(encoder, 32)


def test_a_decoder_gives_the_size_back() -> None:
    assert Decoder(64, 4)(torch.randn(2, 64, 8, 8)).shape == (2, 3, 32, 32)
    assert Decoder(2048, 32, 2)(torch.randn(1, 2048, 3, 3)).shape == (1, 2, 96, 96)
    with pytest.raises(ConfigError, match="no power of two"):
        Decoder(64, 3)


def test_the_loss_is_the_mean_square_and_psnr_is_of_pixels() -> None:
    objective = _objective()
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    decoded = images + 0.1
    loss = objective.loss(Outputs({"images": decoded}, {"images": images}), 0)
    assert float(loss.value) == pytest.approx(0.01)
    of_pixels = 0.01 * sum(std**2 for std in IMAGENET_STD) / 3
    assert float(loss.metrics["psnr"]) == pytest.approx(-10 * math.log10(of_pixels))


def test_a_vaes_loss_is_the_bound_and_its_code_the_samples_own() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar"))
    objective = VAE(encoder, VAEConfig(code=5, beta=0.7), Given(side=SIDE)).double()
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    outputs = objective(_inputs(images))
    loss = objective.loss(outputs, 0)
    mean, variance = outputs.rows["mean"], outputs.rows["log_variance"].exp()
    code, plain = Normal(mean, variance.sqrt()), Normal(0.0, 1.0)
    kl = kl_divergence(code, Normal(torch.zeros_like(mean), 1.0)).sum(1)
    pixels = images[0].numel()
    missed = plain.log_prob(torch.zeros(())) - plain.log_prob(outputs.rows["images"] - images)
    expected = (missed.sum((1, 2, 3)) + 0.7 * kl).mean() / pixels
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(loss.metrics["kl"]) == pytest.approx(float(kl.mean().detach()))
    again = objective.eval()(_inputs(images[1:]))._replace(fixed={})
    shifted = Inputs((images[None, 1:],), torch.arange(2) + 6, torch.ones(2) > 0, 3)
    same = objective(shifted).rows["images"]
    assert not torch.equal(again.rows["images"], same)
    whole = objective(_inputs(images)).rows["images"]
    assert torch.allclose(whole[1:], same)


def test_noise_is_normal_and_the_samples_own() -> None:
    ids = torch.arange(40)
    noise = normal_draws(1, 2, ids, Stream.NOISE, 999)
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / count)
    assert torch.equal(noise[7:9], normal_draws(1, 2, ids[7:9], Stream.NOISE, 999))
    assert not torch.equal(noise, normal_draws(1, 3, ids, Stream.NOISE, 999))


@pytest.mark.parametrize("given", ["image", "noisy", "small"])
def test_the_target_is_the_whole_image_whatever_is_given(given: str) -> None:
    objective = _objective(given=given)
    images = torch.randn(4, 3, SIDE, SIDE)
    before = images.clone()
    seen = []
    objective.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = objective(_inputs(images))
    assert torch.equal(outputs.fixed["images"], before)
    assert torch.equal(seen[0], before) == (given == "image")
    if given == "small":  # what a quarter of the pixels can hold is there, the rest is not
        assert float(seen[0].std()) < 0.5 * float(before.std())
        flat = torch.full_like(images, 0.3)
        objective(_inputs(flat))
        assert torch.allclose(seen[1], flat, atol=1e-5)


def test_sizes_that_do_not_divide_are_refused() -> None:
    view = ViewConfig()
    with pytest.raises(
        ConfigError, match=r"--crop.size 32 does not divide by --objective.factor 5"
    ):
        AutoencoderConfig(given="small", factor=5).views(
            CropConfig(size=32), AugmentConfig(view1=view, view2=view)
        )
