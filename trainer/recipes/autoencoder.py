"""Autoencoders, inpainting and a GAN, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import FLIPS, AugmentConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.autoencoder import AutoencoderConfig
from trainer.objectives.gan import GANConfig
from trainer.objectives.inpainting import InpaintingConfig
from trainer.objectives.vae import VAEConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named


def autoencoder_r50() -> RunConfig:
    """An autoencoder on ImageNet-1k: ResNet-50, batch 256, AdamW, 100 epochs; a baseline.

    --objective.given noisy makes it a denoising one, small a super-resolving one. No figure for a
    ResNet-50 is published: it stands for the floor. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("autoencoder-r50"),
        batch=256,
        epochs=100,
        crop=CropConfig(size=224, scale=(0.2, 1.0)),
        augment=AugmentConfig(view1=FLIPS, view2=FLIPS),
        encoder=EncoderConfig(name="resnet50"),
        objective=AutoencoderConfig(),
        optim=OptimConfig(name="adamw", base_lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=5),
    )


def autoencoder_cifar10_r18() -> RunConfig:
    """An autoencoder on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256; a baseline.

    --objective.given noisy makes it a denoising one, small a super-resolving one.
    """
    return dataclasses.replace(
        autoencoder_r50(),
        **named("autoencoder-cifar10-r18"),
        crop=CropConfig(size=32, scale=(0.5, 1.0)),
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
    )


def vae_r50() -> RunConfig:
    """A variational autoencoder on ImageNet-1k: ResNet-50, 256 numbers of code; a baseline.

    No figure for a ResNet-50 is published. No GPU has run it with this code yet.
    """
    return dataclasses.replace(autoencoder_r50(), **named("vae-r50"), objective=VAEConfig())


def vae_cifar10_r18() -> RunConfig:
    """A variational autoencoder on CIFAR-10 or -100: ResNet-18 with the CIFAR stem; a baseline."""
    return dataclasses.replace(
        autoencoder_cifar10_r18(), **named("vae-cifar10-r18"), objective=VAEConfig(code=128)
    )


def inpainting_r50() -> RunConfig:
    """SimMIM for a ResNet on ImageNet-1k: ResNet-50, 32-pixel patches, 60 % hidden, 300 epochs.

    Published for such settings are transformers alone (83.8 % fine-tuned); a ResNet's linear
    accuracy is far below. --objective.hidden centre --objective.power 2 is the context encoder. No
    GPU has run it with this code yet.
    """
    return dataclasses.replace(
        autoencoder_r50(),
        **named("inpainting-r50"),
        batch=2048,
        epochs=300,
        objective=InpaintingConfig(),
        optim=OptimConfig(name="adamw", base_lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def inpainting_cifar10_r18() -> RunConfig:
    """SimMIM for a ResNet on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, 8-pixel patches."""
    return dataclasses.replace(
        autoencoder_cifar10_r18(),
        **named("inpainting-cifar10-r18"),
        epochs=200,
        objective=InpaintingConfig(patch=8),
    )


def gan_cifar10_r18() -> RunConfig:
    """GAN features of CIFAR-10 or -100: ResNet-18 with the CIFAR stem and no BatchNorm; a baseline.

    Optimizer as DCGAN's (arXiv 1511.06434), whose discriminator, trained on ImageNet, gave 82.8 %
    on CIFAR-10 by all of its layers.
    """
    return dataclasses.replace(
        autoencoder_cifar10_r18(),
        **named("gan-cifar10-r18"),
        batch=128,
        encoder=EncoderConfig(name="resnet18", stem="cifar", norm="layer"),
        objective=GANConfig(),
        optim=OptimConfig(
            name="adamw", base_lr=2e-4, weight_decay=0.0, betas=(0.5, 0.999), lr_scaling="none"
        ),
        schedule=ScheduleConfig(warmup_epochs=0),
    )
