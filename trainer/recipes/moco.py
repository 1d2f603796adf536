"""MoCo v1, v2 and v3, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig, mocov2_views, mocov3_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.moco import MoCoConfig
from trainer.objectives.mocov3 import MoCoV3Config
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named


def mocov1_r50() -> RunConfig:
    """MoCo v1 on ImageNet-1k: ResNet-50, batch 256, SGD, 200 epochs (arXiv 1911.05722).

    Published: 60.8 % after 200 epochs. Settings are the paper's and facebookresearch/moco's; there
    grayscale comes before the jitter, here after it. BatchNorm statistics are each process's own,
    of 32 images on the paper's 8 GPUs, with shuffled keys: see --objective.key-batch-norm. No GPU
    has run it with this code yet.
    """
    # InstDisc's augmentation (arXiv 1805.01978): every image is jittered, none blurred.
    view = ViewConfig(
        jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale=0.2, blur=0.0
    )
    return RunConfig(
        **named("mocov1-r50"),
        batch=256,
        epochs=200,
        sync_batch_norm=False,
        crop=CropConfig(size=224, scale=(0.2, 1.0)),
        augment=AugmentConfig(view1=view, view2=view),
        encoder=EncoderConfig(name="resnet50"),
        head=HeadConfig(layers=1, out_dim=128, last_norm="none"),
        objective=MoCoConfig(temperature=0.07, queue=65536, momentum=0.999),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=1e-4, decay_vectors=True),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=0, milestones=(120.0, 160.0), gamma=0.1
        ),
    )


def mocov2_r50() -> RunConfig:
    """MoCo v2 on ImageNet-1k: ResNet-50, batch 256, SGD, 200 epochs (arXiv 2003.04297).

    Published: 67.5 % after 200 epochs, 71.1 after 800. BatchNorm as in mocov1-r50: for the same run
    on any number of processes add --sync-batch-norm --objective.key-batch-norm sync. No GPU has run
    it with this code yet.
    """
    return dataclasses.replace(
        mocov1_r50(),
        **named("mocov2-r50"),
        augment=mocov2_views(),
        head=HeadConfig(
            layers=2, hidden_dim=2048, out_dim=128, hidden_norm="none", last_norm="none"
        ),
        objective=MoCoConfig(temperature=0.2, queue=65536, momentum=0.999),
        schedule=ScheduleConfig(warmup_epochs=0, cosine_per="epoch"),
    )


def mocov3_r50() -> RunConfig:
    """MoCo v3 on ImageNet-1k: ResNet-50, batch 4096, LARS, 100 epochs (arXiv 2104.02057).

    Published: 68.9 % after 100 epochs; 72.8 after 300 with --optim.base-lr 0.3; 74.6 after 1000
    with that, --optim.weight-decay 1.5e-6 and --objective.momentum 0.996. No GPU has run it with
    this code yet.
    """
    return RunConfig(
        **named("mocov3-r50"),
        batch=4096,
        epochs=100,
        crop=CropConfig(size=224, scale=(0.2, 1.0)),
        augment=mocov3_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=4096, out_dim=256, last_norm="plain"),
        objective=MoCoV3Config(temperature=1.0, momentum=0.99),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.6, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def mocov2_cifar10_r18() -> RunConfig:
    """MoCo v2 on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 512, 800 epochs.

    Settings of facebookresearch/moco's CIFAR-10 notebook (kNN 82.6 % after 200 epochs, 86.3 after
    400, 88.7 after 800), with v2's head in place of its linear one and with synchronised BatchNorm
    in place of its shuffled groups of 64, so that the number of processes changes nothing; it found
    those to be worth 4 points after 800 epochs. Residual branches start at zero, as in all recipes
    for small images. solo-learn's MoCo v2+, whose loss is symmetric, reaches 92.94 % (linear) after
    1000 epochs.
    """
    view = dataclasses.replace(mocov2_views().view1, blur=0.0)
    return RunConfig(
        **named("mocov2-cifar10-r18"),
        batch=512,
        epochs=800,
        crop=CropConfig(size=32, scale=(0.08, 1.0)),
        augment=AugmentConfig(view1=view, view2=view),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=HeadConfig(
            layers=2, hidden_dim=512, out_dim=128, hidden_norm="none", last_norm="none"
        ),
        objective=MoCoConfig(temperature=0.1, queue=4096, momentum=0.99, key_batch_norm="sync"),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=5e-4, decay_vectors=True),
        schedule=ScheduleConfig(warmup_epochs=0, cosine_per="epoch"),
    )


def mocov3_cifar10_r18() -> RunConfig:
    """MoCo v3 on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 512, 1000 epochs.

    Networks, temperature, momentum, weight decay and views are those of solo-learn's CIFAR recipe
    (no blur; 1000 epochs there too); its LARS clips the trust ratio, which ours does not, so the
    learning rate is that of simclr-cifar10-r18. No published figure has exactly these settings.
    """
    return RunConfig(
        **named("mocov3-cifar10-r18"),
        batch=512,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.08, 1.0)),
        augment=mocov3_views(blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=4096, out_dim=256, last_norm="plain"),
        objective=MoCoV3Config(temperature=0.2, momentum=0.99),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=1.0, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )
