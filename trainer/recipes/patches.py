"""Jigsaw and relative patch location, on ImageNet and on small photographs."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.objectives.jigsaw import JigsawConfig
from trainer.objectives.relativepatch import RelativePatchConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

# Two images in three lose their colours, which lenses shift towards the edges.
_GREYS = ViewConfig(jitter=0.0, grayscale=0.66, blur=0.0)


def jigsaw_r50() -> RunConfig:
    """Jigsaw on ImageNet-1k: ResNet-50, batch 256, 100 orders, SGD, 105 epochs.

    Published (VISSL's model zoo): 48.6 %. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("jigsaw-r50"),
        batch=256,
        epochs=105,
        crop=CropConfig(size=255, scale=(0.6, 1.0)),
        augment=AugmentConfig(view1=_GREYS, view2=_GREYS),
        encoder=EncoderConfig(name="resnet50"),
        objective=JigsawConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.1, weight_decay=1e-4),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=5, milestones=(30.0, 60.0, 90.0, 100.0), gamma=0.1
        ),
    )


def relativepatch_r50() -> RunConfig:
    """Relative patch location on ImageNet-1k: ResNet-50, batch 512, SGD, 70 epochs.

    Published with these settings (mmselfsup): 40.4 %, and 51.2 of the stage before the last, where
    it is at its best. No GPU has run it with this code yet.
    """
    return dataclasses.replace(
        jigsaw_r50(),
        **named("relativepatch-r50"),
        batch=512,
        epochs=70,
        objective=RelativePatchConfig(width=4096),
        schedule=ScheduleConfig(kind="steps", warmup_epochs=5, milestones=(30.0, 50.0), gamma=0.1),
    )


def jigsaw_stl10_r18() -> RunConfig:
    """Jigsaw on 96-pixel images such as STL-10's or Imagewang's: ResNet-18, batch 256.

    Cells of 32 pixels and tiles of 24, which a stem of stride 2 leaves 12 pixels of. No published
    figure has these settings.
    """
    return dataclasses.replace(
        jigsaw_r50(),
        **named("jigsaw-stl10-r18"),
        epochs=200,
        crop=CropConfig(size=96, scale=(0.4, 1.0)),
        encoder=EncoderConfig(name="resnet18", stem="cifar-stride2"),
        objective=JigsawConfig(tile=24, width=256),
        optim=OptimConfig(name="sgd", base_lr=0.05, weight_decay=1e-4),
        schedule=ScheduleConfig(warmup_epochs=5),
    )


def relativepatch_stl10_r18() -> RunConfig:
    """Relative patch location on 96-pixel images such as STL-10's or Imagewang's: ResNet-18.

    Geometry and schedule are those of jigsaw-stl10-r18. No published figure has these settings.
    """
    return dataclasses.replace(
        jigsaw_stl10_r18(),
        **named("relativepatch-stl10-r18"),
        objective=RelativePatchConfig(tile=24, width=512),
    )
