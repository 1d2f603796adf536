"""Rotation prediction, on ImageNet and on small images."""

from data_pipeline.augment import FLIPS, AugmentConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.rotation import RotationConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named


def rotation_r50() -> RunConfig:
    """Rotation on ImageNet-1k: ResNet-50, batch 256, SGD, 70 epochs (arXiv 1803.07728).

    Published for a ResNet-50: 47.0 % after 70 epochs with these settings (mmselfsup), 48.2 after
    105 (VISSL). Each image costs four forward passes. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("rotation-r50"),
        batch=256,
        epochs=70,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=AugmentConfig(view1=FLIPS, view2=FLIPS),
        encoder=EncoderConfig(name="resnet50"),
        objective=RotationConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.1, weight_decay=1e-4),
        schedule=ScheduleConfig(kind="steps", warmup_epochs=5, milestones=(30.0, 50.0), gamma=0.1),
    )


def rotation_cifar10_r18() -> RunConfig:
    """Rotation on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 128, 200 epochs.

    Learning rate, weight decay and length are those of the paper's code for its network in network;
    no published figure has exactly these settings.
    """
    return RunConfig(
        **named("rotation-cifar10-r18"),
        batch=128,
        epochs=200,
        crop=CropConfig(size=32, scale=(0.5, 1.0)),
        augment=AugmentConfig(view1=FLIPS, view2=FLIPS),
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
        objective=RotationConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=0, milestones=(60.0, 120.0, 160.0), gamma=0.2
        ),
    )
