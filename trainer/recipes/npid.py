"""Instance discrimination by a memory bank, on ImageNet and on small images."""

import dataclasses

from data_pipeline.augment import AugmentConfig, ViewConfig
from data_pipeline.crops import CropConfig
from trainer.config import RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.pirl import PIRLConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes.named import named

_VIEW = ViewConfig(
    jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale=0.2, blur=0.0
)
_HEAD = HeadConfig(layers=1, out_dim=128, last_norm="none")


def npid_r50() -> RunConfig:
    """NPID on ImageNet-1k: ResNet-50, batch 256, 65,536 negatives, 200 epochs (arXiv 1805.01978).

    Published: 54.0 % with 4,096 negatives and the noise-contrastive estimate; 58.5 with these, the
    softmax of the authors' later code. No GPU has run it with this code yet.
    """
    return RunConfig(
        **named("npid-r50"),
        batch=256,
        epochs=200,
        crop=CropConfig(size=224, scale=(0.2, 1.0)),
        augment=AugmentConfig(view1=_VIEW, view2=_VIEW),
        encoder=EncoderConfig(name="resnet50"),
        head=_HEAD,
        objective=NPIDConfig(memory_bits=16),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=1e-4, decay_vectors=True),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=0, milestones=(120.0, 160.0), gamma=0.1
        ),
    )


def npid_cifar10_r18() -> RunConfig:
    """NPID on CIFAR-10 or -100: ResNet-18 with the CIFAR stem, batch 128, softmax over all images.

    Published: kNN 80.8 % on CIFAR-10 after 200 epochs; learning rate, temperature and weight decay
    are those of the authors' code.
    """
    return RunConfig(
        **named("npid-cifar10-r18"),
        batch=128,
        epochs=200,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        augment=AugmentConfig(view1=_VIEW, view2=_VIEW),
        encoder=EncoderConfig(name="resnet18", stem="cifar"),
        head=_HEAD,
        objective=NPIDConfig(temperature=0.1, negatives=0, momentum=0.5),
        optim=OptimConfig(name="sgd", base_lr=0.06, weight_decay=5e-4, decay_vectors=True),
        schedule=ScheduleConfig(
            kind="steps", warmup_epochs=0, milestones=(120.0, 160.0), gamma=0.1
        ),
    )


def npid_plus_plus_r50() -> RunConfig:
    """NPID++ on ImageNet-1k: ResNet-50, batch 1024, 32,000 negatives, 800 epochs.

    Published (arXiv 1912.01991): 59.0 %, 56.7 by VISSL, whose settings these are, but for biases,
    which decay there. No GPU has run it with this code yet.
    """
    view = dataclasses.replace(_VIEW, grayscale=0.0)
    return dataclasses.replace(
        npid_r50(),
        **named("npid-plus-plus-r50"),
        batch=1024,
        epochs=800,
        crop=CropConfig(size=224, scale=(0.08, 1.0)),
        augment=AugmentConfig(view1=view, view2=view),
        optim=OptimConfig(name="sgd", base_lr=0.03, weight_decay=1e-4),
        objective=NPIDConfig(negatives=32000, memory_bits=16),
        schedule=ScheduleConfig(warmup_epochs=0, final_lr_fraction=0.001),
    )


def pirl_r50() -> RunConfig:
    """PIRL on ImageNet-1k: ResNet-50, jigsaw, batch 1024, 32,000 negatives, 800 epochs.

    Published (arXiv 1912.01991): 63.6 %, with a noise-contrastive estimate in the place of the
    softmax, and tiles that are altered one by one, contrast and sharpness among it; here as one
    image. No GPU has run it with this code yet.
    """
    view = dataclasses.replace(_VIEW, hue=0.2)
    return dataclasses.replace(
        npid_plus_plus_r50(),
        **named("pirl-r50"),
        augment=AugmentConfig(view1=view, view2=view),
        objective=PIRLConfig(memory_bits=16),
    )


def pirl_cifar10_r18() -> RunConfig:
    """PIRL on CIFAR-10 or -100: turned images, for 32 pixels leave tiles too few; else as NPID.

    No published figure has these settings.
    """
    objective = PIRLConfig(
        temperature=0.1,
        negatives=0,
        transform="rotation",
        second_crop=CropConfig(size=32, scale=(0.2, 1.0)),
    )
    return dataclasses.replace(npid_cifar10_r18(), **named("pirl-cifar10-r18"), objective=objective)
