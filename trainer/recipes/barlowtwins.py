"""Barlow Twins, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import mocov3_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.barlowtwins import BarlowTwinsConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_HEAD = HeadConfig(layers=3, hidden_dim=8192, out_dim=8192, last_norm="none", linear_bias="never")


def barlowtwins_r50() -> RunConfig:
    """Barlow Twins on ImageNet-1k: ResNet-50, batch 2048, LARS, 1000 epochs (arXiv 2103.03230).

    Published: 73.2 % after 1000 epochs; 71.8 after 300 (mmselfsup). The authors give biases and
    BatchNorm a rate of 0.0048, 0.024 of the matrices': here the loss is multiplied by that, which
    LARS undoes for matrices. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("barlowtwins-r50"),
        batch=2048,
        epochs=1000,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=mocov3_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=_HEAD,
        objective=BarlowTwinsConfig(scale=0.024),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.2, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10, final_lr_fraction=0.001),
    )


def barlowtwins_cifar10_r18() -> RunConfig:
    """Barlow Twins on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 92.10 % on CIFAR-10, 70.90 on CIFAR-100 (solo-learn). Networks, views and the loss's
    scale are those of that recipe; its LARS clips the trust ratio, which ours does not, so learning
    rate and weight decay are those of the ImageNet recipe. Nothing was measured with this code.
    """
    return RunConfig(
        **named("barlowtwins-cifar10-r18"),
        batch=256,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.08, 1.0)),
        augment=mocov3_views(blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=dataclasses.replace(_HEAD, hidden_dim=2048, out_dim=2048),
        objective=BarlowTwinsConfig(scale=0.1),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.2, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10, final_lr_fraction=0.001),
    )
