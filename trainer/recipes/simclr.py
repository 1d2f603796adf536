"""SimCLR, on ImageNet and on small images; `make demo` trains the smallest."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig, simclr_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.features.online_knn import OnlineKnnConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named


def simclr_r50() -> RunConfig:
    """SimCLR on ImageNet-1k: ResNet-50, batch 4096, LARS, 100 epochs (arXiv 2002.05709).

    Published: 64.4-64.5 % after 100 epochs, 66.6-66.9 after 200, 69.1-69.7 after 800 to 1000. No
    GPU has run it with this code yet.
    """
    return RunConfig(
        **named("simclr-r50"),
        batch=4096,
        epochs=100,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=simclr_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=2048, out_dim=128),
        objective=SimCLRConfig(temperature=0.1),
        optim=OptimConfig(name="lars", base_lr=0.3, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def simclr_v2_r50() -> RunConfig:
    """SimCLR v2 on ImageNet-1k: a three-layer head, 800 epochs (arXiv 2006.10029).

    Published: 71.7 %, and 57.9 / 68.4 % fine-tuned on 1 / 10 % of the labels from the head's first
    layer. No GPU has run it with this code yet.
    """
    return dataclasses.replace(
        simclr_r50(),
        **named("simclr-v2-r50"),
        epochs=800,
        head=HeadConfig(layers=3, hidden_dim=2048, out_dim=128),
        optim=OptimConfig(name="lars", base_lr=0.3, weight_decay=1e-4),
    )


def simclr_cifar10_r18() -> RunConfig:
    """SimCLR on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 512, 1000 epochs.

    Published: about 91 % on CIFAR-10 (solo-learn 90.74). Jitter at half strength, no blur,
    temperature 0.5, as the paper's appendix B.9 has it.
    """
    return RunConfig(
        **named("simclr-cifar10-r18"),
        batch=512,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.08, 1.0)),
        augment=simclr_views(strength=0.5, blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=512, out_dim=128),
        objective=SimCLRConfig(temperature=0.5),
        optim=OptimConfig(name="lars", base_lr=1.0, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def simclr_stl10_r18() -> RunConfig:
    """SimCLR on 96-pixel images such as STL-10's unlabelled split: ResNet-18, batch 512.

    The ImageNet recipe's views and temperature at a small network's size; no published figure has
    exactly these settings.
    """
    return RunConfig(
        **named("simclr-stl10-r18"),
        batch=512,
        epochs=200,
        crop=CropConfig(size=96, scale=(0.08, 1.0)),
        augment=simclr_views(),
        encoder=EncoderConfig(name="resnet18", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=512, out_dim=128),
        objective=SimCLRConfig(temperature=0.2),
        optim=OptimConfig(name="lars", base_lr=0.6, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def digits_demo() -> RunConfig:
    """What `make demo` trains: embedded coloured digits, a small ResNet, minutes on two CPU cores.

    Views disagree about colour, polarity, size and place, so what they share is the digit's shape:
    strong jitter, frequent grayscale and solarisation, no flips (a mirrored digit is none).
    """
    view = ViewConfig(flip=0.0, hue=0.5, grayscale=0.6, blur=0.0, solarize=0.5)
    return RunConfig(
        **named("digits-demo"),
        batch=128,
        epochs=28,
        precision="fp32",  # on CPU cores bf16 is slower for a network this small
        crop=CropConfig(size=32, scale=(0.3, 1.0)),
        augment=AugmentConfig(view1=view, view2=view),
        encoder=EncoderConfig(name="resnet8x2", stem="cifar-stride2", zero_init_residual=True),
        head=HeadConfig(layers=2, hidden_dim=512, out_dim=128),
        objective=SimCLRConfig(temperature=0.2),
        optim=OptimConfig(name="lars", base_lr=8.0, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=0.35),
        knn=OnlineKnnConfig(every_epochs=8),
    )
