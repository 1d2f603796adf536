"""Supervised training, on ImageNet and on small images: what the others are compared with."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.supervised import SupervisedConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_FLIPS = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0)


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
        augment=AugmentConfig(view1=_FLIPS, view2=_FLIPS),
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
