"""BYOL, SimSiam and NNCLR, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import AugmentConfig, mocov2_views, mocov3_views, simclr_views
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.byol import BYOLConfig
from trainer.objectives.nnclr import NNCLRConfig
from trainer.objectives.simsiam import SimSiamConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_BYOL_HEAD = HeadConfig(layers=2, hidden_dim=4096, out_dim=256, last_norm="none")
_NNCLR_HEAD = HeadConfig(layers=3, hidden_dim=2048, out_dim=256, last_norm="affine")
_SIMSIAM_HEAD = HeadConfig(layers=3, hidden_dim=2048, out_dim=2048, last_norm="plain")


def byol_r50() -> RunConfig:
    """BYOL on ImageNet-1k: ResNet-50, batch 4096, LARS, 1000 epochs (arXiv 2006.07733).

    Published: 74.3 % after 1000 epochs. 300 epochs, 72.5: --optim.base-lr 0.3 --optim.weight-decay
    1e-6 --objective.momentum 0.99. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("byol-r50"),
        batch=4096,
        epochs=1000,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=mocov3_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=_BYOL_HEAD,
        objective=BYOLConfig(momentum=0.996, predictor=_BYOL_HEAD),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.2, weight_decay=1.5e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def byol_cifar10_r18() -> RunConfig:
    """BYOL on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 92.58 % on CIFAR-10, 70.46 on CIFAR-100 (solo-learn). Networks, momentum and views
    are those of that recipe; its LARS clips the trust ratio, which ours does not, so the rate
    is that of simclr-cifar10-r18.
    """
    return RunConfig(
        **named("byol-cifar10-r18"),
        batch=256,
        epochs=1000,
        crop=CropConfig(size=32, scale=(0.08, 1.0)),
        augment=mocov3_views(blur=False),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=_BYOL_HEAD,
        objective=BYOLConfig(momentum=0.99, predictor=_BYOL_HEAD),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=1.0, weight_decay=1e-6),
        schedule=ScheduleConfig(warmup_epochs=10),
    )


def simsiam_r50() -> RunConfig:
    """SimSiam on ImageNet-1k: ResNet-50, batch 256, SGD, 100 epochs (arXiv 2011.10566).

    Published: 68.1 % after 100 epochs, 71.3 after 800. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("simsiam-r50"),
        batch=256,
        epochs=100,
        crop=CropConfig(size=224, scale=(0.2, 1.0)),
        augment=mocov2_views(),
        encoder=EncoderConfig(name="resnet50", zero_init_residual=True),
        head=_SIMSIAM_HEAD,
        objective=SimSiamConfig(),
        optim=OptimConfig(
            name="sgd",
            base_lr=0.05,
            weight_decay=1e-4,
            decay_vectors=True,
            steady=("predictor",),
        ),
        schedule=ScheduleConfig(warmup_epochs=0, cosine_per="epoch"),
    )


def simsiam_cifar10_r18() -> RunConfig:
    """SimSiam on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 512, 800 epochs.

    Published: 91.8 % (the paper's appendix D, whose settings these are).
    """
    view = dataclasses.replace(mocov2_views().view1, blur=0.0)
    return dataclasses.replace(
        simsiam_r50(),
        **named("simsiam-cifar10-r18"),
        batch=512,
        epochs=800,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=AugmentConfig(view1=view, view2=view),
        encoder=EncoderConfig(name="resnet18", stem="cifar", zero_init_residual=True),
        head=dataclasses.replace(_SIMSIAM_HEAD, layers=2),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=5e-4, decay_vectors=True),
    )


def nnclr_r50() -> RunConfig:
    """NNCLR on ImageNet-1k: ResNet-50, batch 4096, LARS, 1000 epochs (arXiv 2104.14548).

    Published: 75.4 %. No GPU has run it with this code yet.
    """
    return dataclasses.replace(
        byol_r50(),
        **named("nnclr-r50"),
        augment=simclr_views(),
        head=_NNCLR_HEAD,
        objective=NNCLRConfig(),
        optim=OptimConfig(name="lars", base_lr=0.3, weight_decay=1e-6),
    )


def nnclr_cifar10_r18() -> RunConfig:
    """NNCLR on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 91.88 % on CIFAR-10, 69.62 on CIFAR-100 (solo-learn, whose LARS clips the trust
    ratio; ours does not, so the rate is that of simclr-cifar10-r18).
    """
    return dataclasses.replace(
        byol_cifar10_r18(),
        **named("nnclr-cifar10-r18"),
        augment=simclr_views(strength=0.5, blur=False),
        head=_NNCLR_HEAD,
        objective=NNCLRConfig(temperature=0.2, queue=65536),
        optim=OptimConfig(name="lars", base_lr=1.0, weight_decay=1e-6),
    )
