"""Contrastive predictive coding, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.cpc import CPCConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_VIEW = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.25, blur=0.0)


def cpc_r50() -> RunConfig:
    """CPC v2 on ImageNet-1k: ResNet-50 without BatchNorm, 49 patches, batch 512, AdamW, 200 epochs.

    Published for a ResNet-50: 63.8 % (arXiv 1905.09272), with larger patches and many more
    distortions of each. An image costs four forward passes. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("cpc-r50"),
        batch=512,
        epochs=200,
        crop=CropConfig(size=256, scale=(0.3, 1.0)),
        augment=AugmentConfig(view1=_VIEW, view2=_VIEW),
        encoder=EncoderConfig(name="resnet50", norm="layer"),
        objective=CPCConfig(),
        optim=OptimConfig(
            name="adamw", base_lr=2e-4, weight_decay=1e-5, betas=(0.8, 0.999), lr_scaling="none"
        ),
        schedule=ScheduleConfig(warmup_epochs=5),
    )


def cpc_cifar10_r18() -> RunConfig:
    """CPC on CIFAR-10 or -100: ResNet-18 without BatchNorm, 49 patches, batch 128, 200 epochs.

    Published with such patches: 84.5 % on CIFAR-10, of a ResNet-101 (bolts).
    """
    return dataclasses.replace(
        cpc_r50(),
        **named("cpc-cifar10-r18"),
        batch=128,
        crop=CropConfig(size=32, scale=(0.3, 1.0)),
        encoder=EncoderConfig(name="resnet18", stem="cifar", norm="layer"),
        objective=CPCConfig(patch=8),
    )
