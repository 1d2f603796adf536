"""DINO and iBOT, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import mocov3_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.dino import DINOConfig
from trainer.objectives.ibot import IBOTConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_HEAD = HeadConfig(
    layers=3, hidden_dim=2048, out_dim=256, hidden_norm="none", last_norm="none", activation="gelu"
)


def dino_r50() -> RunConfig:
    """DINO on ImageNet-1k: ResNet-50, batch 1024, 2 x 224 and 6 x 96 pixels, SGD, 800 epochs.

    Published (arXiv 2104.14294): 75.3 %, kNN 67.5, of 800 epochs in batches of 4080; optimizer and
    schedules are those of the authors' shorter runs. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("dino-r50"),
        batch=1024,
        epochs=800,
        crop=CropConfig(size=224, scale=(0.14, 1.0)),
        augment=mocov3_views(),
        encoder=EncoderConfig(name="resnet50"),
        head=_HEAD,
        objective=DINOConfig(small_blur=0.5),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=1e-4),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def dino_vits16() -> RunConfig:
    """DINO on ImageNet-1k: ViT-S/16, batch 1024, 2 x 224 and 10 x 96 pixels, AdamW, 800 epochs.

    Published (arXiv 2104.14294): 77.0 %, kNN 74.5, with stochastic depth besides, and directions
    whose lengths are learnt. No GPU has run it with this code yet.
    """
    small = CropConfig(size=96, scale=(0.05, 0.25))
    return dataclasses.replace(
        dino_r50(),
        **named("dino-vits16"),
        crop=CropConfig(size=224, scale=(0.25, 1.0)),
        encoder=EncoderConfig(name="vit_s_16", image_size=224),
        objective=DINOConfig(small_views=10, small_crop=small, small_blur=0.5),
        optim=OptimConfig(name="adamw", base_lr=5e-4, weight_decay=0.04, clip_norm=3.0),
        schedule=ScheduleConfig(warmup_epochs=10, final_lr_fraction=0.005, final_weight_decay=0.4),
    )


def dino_cifar10_r18() -> RunConfig:
    """DINO on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 89.52 % on CIFAR-10 (solo-learn, two views of one size, 4,096 directions). Here four
    views of 20 pixels stand beside them; no published figure has these settings.
    """
    return dataclasses.replace(
        dino_r50(),
        **named("dino-cifar10-r18"),
        batch=256,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=mocov3_views(blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        objective=DINOConfig(
            directions=4096,
            teacher_warmup_steps=1950,
            momentum=0.99,
            frozen_steps=195,
            small_views=4,
            small_crop=CropConfig(size=20, scale=(0.05, 0.3)),
            small_blur=0.0,
        ),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.3, weight_decay=1e-6),
    )


def ibot_vits16() -> RunConfig:
    """iBOT on ImageNet-1k: ViT-S/16, batch 1024, 2 x 224 and 10 x 96 pixels, AdamW, 800 epochs.

    Published (arXiv 2111.07832): 77.9 %, kNN 75.2, with stochastic depth besides. No GPU has run it
    with this code yet.
    """
    small = CropConfig(size=96, scale=(0.05, 0.25))
    return dataclasses.replace(
        dino_vits16(),
        **named("ibot-vits16"),
        objective=IBOTConfig(small_crop=small, small_blur=0.5),
    )


def ibot_cifar10_vitti4() -> RunConfig:
    """iBOT on CIFAR-10 or -100: a tiny ViT with patches of 4 pixels, batch 256, 200 epochs.

    No published figure has these settings.
    """
    return dataclasses.replace(
        dino_vits16(),
        **named("ibot-cifar10-vitti4"),
        batch=256,
        epochs=200,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=mocov3_views(blur=False),
        encoder=EncoderConfig(name="vit_ti_4", image_size=32),
        objective=IBOTConfig(
            directions=4096,
            teacher_warmup_steps=1950,
            frozen_steps=195,
            small_views=4,
            small_crop=CropConfig(size=20, scale=(0.05, 0.3)),
            small_blur=0.0,
        ),
    )
