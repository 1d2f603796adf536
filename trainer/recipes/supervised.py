"""Supervised training, on ImageNet and on small images: what the others are compared with."""

import dataclasses

from data_pipeline.augment import FLIPS, AugmentConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.supcon import SupConConfig
from trainer.objectives.supervised import SupervisedConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named
from trainer.recipes.simclr import simclr_cifar10_r18, simclr_r50


def supervised_r50() -> RunConfig:
    """Supervised ResNet-50 on ImageNet-1k: batch 1024, SGD, 90 epochs (arXiv 1706.02677).

    Published: 76.2 % of its own classifier. Labels come from the training file. No GPU has run it
    with this code yet.
    """
    return RunConfig(
        **named("supervised-r50"),
        batch=1024,
        epochs=90,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=AugmentConfig(view1=FLIPS, view2=FLIPS),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        objective=SupervisedConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.1, weight_decay=1e-4),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=5, milestones=(30.0, 60.0, 80.0), gamma=0.1
        ),
    )


def supervised_cifar10_r18() -> RunConfig:
    """Supervised ResNet-18 with the CIFAR stem on CIFAR-10 or -100: batch 128, 200 epochs.

    Published for such networks: 95 % on CIFAR-10.
    """
    return dataclasses.replace(
        supervised_r50(),
        **named("supervised-cifar10-r18"),
        batch=128,
        epochs=200,
        crop=CropConfig(size=32, scale=(0.3, 1.0)),
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
        optim=OptimConfig(name="sgd", base_lr=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=5),
    )


def supcon_r50() -> RunConfig:
    """Supervised contrastive learning on ImageNet-1k: ResNet-50, batch 6144, LARS, 350 epochs.

    Khosla et al. 2020, arXiv 2004.11362.
    Published: 78.7 %, with AutoAugment in the place of SimCLR's views. No GPU has run it with this
    code yet.
    """
    return dataclasses.replace(
        simclr_r50(),
        **named("supcon-r50"),
        batch=6144,
        epochs=350,
        objective=SupConConfig(temperature=0.1),
    )


def supcon_cifar10_r18() -> RunConfig:
    """Supervised contrastive learning on CIFAR-10 or -100: ResNet-18, batch 1024, SGD, 1000 epochs.

    Published: 96.0 % on CIFAR-10, of a ResNet-50.
    """
    return dataclasses.replace(
        simclr_cifar10_r18(),
        **named("supcon-cifar10-r18"),
        batch=1024,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        objective=SupConConfig(temperature=0.1),
        optim=OptimConfig(name="sgd", base_lr=0.125, weight_decay=1e-4),
    )
