"""Several objectives at once, on ImageNet and on small images."""

import dataclasses

from trainer.config import RunConfig
from trainer.objectives.colourisation import ColourisationConfig
from trainer.objectives.joint import JointConfig, TaskConfig
from trainer.objectives.relativepatch import RelativePatchConfig
from trainer.objectives.rotation import RotationConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.recipes.colourisation import colourisation_r50
from trainer.recipes.named import named
from trainer.recipes.simclr import simclr_cifar10_r18, simclr_r50


def essl_r50() -> RunConfig:
    """E-SSL on ImageNet-1k: SimCLR, and rotation of a third, small view; 100 epochs.

    Dangovski et al. 2022, arXiv 2111.00899. SimCLR is task 0, rotation task 1.

    Published: 68.2 % after 100 epochs, where SimCLR alone has 67.6 in their code. No GPU has run it
    with this code yet.
    """
    rotation = TaskConfig(task=RotationConfig(), weight=0.4, side=96, scale=(0.05, 0.14))
    tasks = (TaskConfig(task=SimCLRConfig(temperature=0.1)), rotation)
    return dataclasses.replace(
        simclr_r50(), **named("essl-r50"), objective=JointConfig(tasks=tasks)
    )


def essl_cifar10_r18() -> RunConfig:
    """E-SSL on CIFAR-10 or -100: SimCLR, and rotation of a third view; ResNet-18, batch 512.

    SimCLR is task 0, rotation task 1. No published figure has exactly these settings.
    """
    rotation = TaskConfig(task=RotationConfig(), weight=0.4, scale=(0.2, 1.0))
    tasks = (TaskConfig(task=SimCLRConfig(temperature=0.5)), rotation)
    return dataclasses.replace(
        simclr_cifar10_r18(), **named("essl-cifar10-r18"), objective=JointConfig(tasks=tasks)
    )


def multitask_r50() -> RunConfig:
    """Colourisation and relative patch location on ImageNet-1k, both of grey images; 105 epochs.

    Doersch & Zisserman 2017, arXiv 1708.07860. Colourisation is task 0, location task 1.
    Grey for both, or colours would tell an encoder which task it has before it. Published of such
    a pair, top-5 of a ResNet-101: 66.6 %, where they have 62.5 and 59.2 alone. No GPU has run it
    with this code yet.
    """
    tasks = (
        TaskConfig(task=ColourisationConfig()),
        TaskConfig(task=RelativePatchConfig(), side=255, scale=(0.2, 1.0)),
    )
    return dataclasses.replace(
        colourisation_r50(),
        **named("multitask-r50"),
        objective=JointConfig(tasks=tasks),
    )
