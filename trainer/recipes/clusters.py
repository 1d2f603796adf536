"""DeepCluster, its second version, SeLa and SwAV, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import simclr_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.deepcluster import DeepClusterConfig
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.sela import SeLaConfig
from trainer.objectives.swav import SwAVConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named


def deepclusterv2_r50() -> RunConfig:
    """DeepCluster-v2 on ImageNet-1k: ResNet-50, batch 4096, 2 x 224 and 6 x 96 pixels, 800 epochs.

    Published (arXiv 2006.09882): 75.2 %. LARS stands in for the authors' LARC, whose trust ratio is
    the same but for the place of the weight decay. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("deepclusterv2-r50"),
        batch=4096,
        epochs=800,
        crop=CropConfig(size=224, scale=(0.14, 1.0)),
        augment=simclr_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=2048, out_dim=128, last_norm="none"),
        objective=DeepClusterV2Config(memory_bits=8),
        optim=OptimConfig(name="lars", base_lr=0.3, weight_decay=1e-6),
        schedule=ScheduleConfig(
            warmup_epochs=10, warmup_start_fraction=0.0625, final_lr_fraction=0.001
        ),
    )


def deepclusterv2_cifar10_r18() -> RunConfig:
    """DeepCluster-v2 on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 88.85 % on CIFAR-10 (solo-learn, two views of one size). Here four views of 20 pixels
    stand beside them, and 500 clusters of each head instead of 3,000.
    """
    return RunConfig(
        **named("deepclusterv2-cifar10-r18"),
        batch=256,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=simclr_views(strength=0.5, blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=2048, out_dim=128, last_norm="none"),
        objective=DeepClusterV2Config(
            prototypes=500, small_views=4, small_crop=CropConfig(size=20, scale=(0.05, 0.3))
        ),
        optim=OptimConfig(name="lars", base_lr=0.6, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def swav_r50() -> RunConfig:
    """SwAV on ImageNet-1k: ResNet-50, batch 4096, 2 x 224 and 6 x 96 pixels, 800 epochs.

    Published (arXiv 2006.09882): 75.3 %; 74.6 after 400 epochs, 72.1 after 100. With a batch of
    256: --objective.queue 3840 --objective.queue-from 75000 --objective.frozen-steps 5004
    --schedule.warmup-epochs 0 --optim.base-lr 0.6. LARS stands in for the authors' LARC. No GPU has
    run it with this code yet.
    """
    return dataclasses.replace(deepclusterv2_r50(), **named("swav-r50"), objective=SwAVConfig())


def swav_cifar10_r18() -> RunConfig:
    """SwAV on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 89.17 % on CIFAR-10 (solo-learn, two views of one size, 3,000 prototypes). Here four
    views of 20 pixels stand beside them, and there are 500 prototypes, with a queue from the 15th
    epoch on.
    """
    recipe = deepclusterv2_cifar10_r18()
    objective = SwAVConfig(
        prototypes=500,
        small_views=4,
        small_crop=CropConfig(size=20, scale=(0.05, 0.3)),
        frozen_steps=195,
        queue=3840,
        queue_from=2925,
    )
    return dataclasses.replace(recipe, **named("swav-cifar10-r18"), objective=objective)


def sela_r50() -> RunConfig:
    """SeLa-v2 on ImageNet-1k: ResNet-50, batch 4096, 2 x 160 and 4 x 96 pixels, 400 epochs.

    Published (arXiv 2006.09882): 71.8 %. LARS stands in for the authors' LARC. No GPU has run it
    with this code yet.
    """
    small = CropConfig(size=96, scale=(0.05, 0.14))
    return dataclasses.replace(
        deepclusterv2_r50(),
        **named("sela-r50"),
        epochs=400,
        crop=CropConfig(size=160, scale=(0.08, 1.0)),
        objective=SeLaConfig(small_views=4, small_crop=small, memory_bits=8),
    )


def sela_cifar10_r18() -> RunConfig:
    """SeLa-v2 on CIFAR-10 or -100: as DeepCluster-v2, with 500 prototypes of each head.

    No published figure has these settings.
    """
    recipe = deepclusterv2_cifar10_r18()
    objective = SeLaConfig(
        prototypes=500, small_views=4, small_crop=CropConfig(size=20, scale=(0.05, 0.3))
    )
    return dataclasses.replace(recipe, **named("sela-cifar10-r18"), objective=objective)


def deepcluster_r50() -> RunConfig:
    """DeepCluster on ImageNet-1k: ResNet-50, batch 512, 10,000 clusters, 200 epochs.

    Published: 46.9 % (mmselfsup, whose network sees edges alone). No GPU has run it with this code
    yet.
    """
    return RunConfig(
        **named("deepcluster-r50"),
        batch=512,
        epochs=200,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=simclr_views(strength=0.5),
        encoder=EncoderConfig(name="resnet50"),
        objective=DeepClusterConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.05, weight_decay=1e-5, decay_vectors=True),
        schedule=ScheduleConfig(kind="constant", warmup_epochs=0),
    )


def deepcluster_cifar10_r18() -> RunConfig:
    """DeepCluster on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, 500 clusters, 200 epochs.

    No published figure has these settings.
    """
    return dataclasses.replace(
        deepcluster_r50(),
        **named("deepcluster-cifar10-r18"),
        batch=256,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=simclr_views(strength=0.5, blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
        objective=DeepClusterConfig(clusters=500, components=128),
    )
