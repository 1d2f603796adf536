"""Colourisation, on ImageNet and on small images."""

import dataclasses

from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.colourisation import ColourisationConfig
from trainer.recipes.named import named
from trainer.recipes.rotation import rotation_cifar10_r18, rotation_r50


def colourisation_r50() -> RunConfig:
    """Colourisation on ImageNet-1k: ResNet-50, batch 256, SGD, 105 epochs (arXiv 1603.08511).

    Published for a ResNet-50: 40.1 % (VISSL, the settings that it has for all tasks of the kind).
    --objective.decodes hues is the regression. No GPU has run it with this code yet.
    """
    recipe = rotation_r50()
    return dataclasses.replace(
        recipe,
        **named("colourisation-r50"),
        epochs=105,
        encoder=EncoderConfig(name="resnet50", sees="grey"),
        objective=ColourisationConfig(),
        schedule=dataclasses.replace(recipe.schedule, milestones=(30.0, 60.0, 90.0, 100.0)),
    )


def colourisation_cifar10_r18() -> RunConfig:
    """Colourisation on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 128, 200 epochs.

    Hues at a quarter of the side, 8 pixels; no published figure has these settings.
    """
    return dataclasses.replace(
        rotation_cifar10_r18(),
        **named("colourisation-cifar10-r18"),
        crop=CropConfig(size=32, scale=(0.5, 1.0)),
        encoder=EncoderConfig(name="resnet18", stem="cifar", sees="grey"),
        objective=ColourisationConfig(),
    )
