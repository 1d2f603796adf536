"""VICReg, on ImageNet and on small images."""

import dataclasses

from trainer.config import RunConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.vicreg import VICRegConfig
from trainer.optim.optimizers import OptimConfig
from trainer.recipes import barlowtwins
from trainer.recipes.named import named

_HEAD = HeadConfig(layers=3, hidden_dim=8192, out_dim=8192, last_norm="none", linear_bias="never")


def vicreg_r50() -> RunConfig:
    """VICReg on ImageNet-1k: ResNet-50, batch 2048, LARS, 1000 epochs (arXiv 2105.04906).

    Published: 73.2 % after 1000 epochs. Views and schedule are those of barlowtwins-r50. No GPU has
    run it with this code yet.
    """
    return dataclasses.replace(
        barlowtwins.barlowtwins_r50(),
        **named("vicreg-r50"),
        head=_HEAD,
        objective=VICRegConfig(),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.2, weight_decay=1e-6),
    )


def vicreg_cifar10_r18() -> RunConfig:
    """VICReg on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 256, 1000 epochs.

    Published: 92.07 % on CIFAR-10, 68.54 on CIFAR-100 (solo-learn), whose networks and views these
    are, and whose variance is the sum of both views' and not their mean: hence a weight of 50. Its
    LARS clips the trust ratio, which ours does not, so learning rate and weight decay are those of
    the ImageNet recipe.
    """
    return dataclasses.replace(
        barlowtwins.barlowtwins_cifar10_r18(),
        **named("vicreg-cifar10-r18"),
        head=dataclasses.replace(_HEAD, hidden_dim=2048, out_dim=2048),
        objective=VICRegConfig(variance=50.0),
        optim=OptimConfig(name="lars", variant="mocov3", base_lr=0.2, weight_decay=1e-6),
    )
