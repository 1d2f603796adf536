"""A tiny run of each objective: its recipe with small networks and a few images."""

import dataclasses
from pathlib import Path
from typing import Any

from data_pipeline.crops import CropConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.pool import LoaderConfig
from tests.trainer.runs import SMALL_ENCODER
from trainer.config import DataConfig, RunConfig
from trainer.models.encoders import EncoderConfig
from trainer.models.heads import HeadConfig
from trainer.objectives.autoencoder import AutoencoderConfig
from trainer.objectives.barlowtwins import BarlowTwinsConfig
from trainer.objectives.byol import BYOLConfig
from trainer.objectives.colourisation import ColourisationConfig
from trainer.objectives.cpc import CPCConfig
from trainer.objectives.deepcluster import DeepClusterConfig
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.dino import DINOConfig
from trainer.objectives.frameorder import FrameOrderConfig
from trainer.objectives.gan import GANConfig
from trainer.objectives.ibot import IBOTConfig
from trainer.objectives.inpainting import InpaintingConfig
from trainer.objectives.jigsaw import JigsawConfig
from trainer.objectives.joint import JointConfig, TaskConfig
from trainer.objectives.mae import MAEConfig
from trainer.objectives.moco import MoCoConfig
from trainer.objectives.mocov3 import MoCoV3Config
from trainer.objectives.nnclr import NNCLRConfig
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.pirl import PIRLConfig
from trainer.objectives.relativepatch import RelativePatchConfig
from trainer.objectives.rotation import RotationConfig
from trainer.objectives.sela import SeLaConfig
from trainer.objectives.simclr import SimCLRConfig
from trainer.objectives.simsiam import SimSiamConfig
from trainer.objectives.swav import SwAVConfig
from trainer.objectives.vae import VAEConfig
from trainer.optim.optimizers import OptimConfig
from trainer.optim.schedule import ScheduleConfig
from trainer.recipes import RECIPES
from trainer.state.checkpoint import CheckpointConfig
from trainer.telemetry import TelemetryConfig


def tiny_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SimCLR with LARS, augmentation and BatchNorm on a ResNet-18: all that a real run has."""
    head = HeadConfig(layers=2, hidden_dim=64, out_dim=32)
    return _tiny("simclr-cifar10-r18", data, out, **{"head": head, **changes})


def tiny_mocov2_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """MoCo v2 with SGD, synchronised BatchNorm and a queue that no batch divides."""
    settings: dict[str, Any] = {
        "head": HeadConfig(hidden_dim=64, out_dim=32, hidden_norm="none", last_norm="none"),
        "objective": MoCoConfig(temperature=0.2, queue=40, momentum=0.9, key_batch_norm="sync"),
    }
    return _tiny("mocov2-cifar10-r18", data, out, **{**settings, **changes})


def tiny_mocov3_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """MoCo v3 with LARS, a predictor and the cosine of the momentum."""
    predictor = HeadConfig(hidden_dim=64, out_dim=32, last_norm="none", linear_bias="never")
    settings: dict[str, Any] = {
        "head": HeadConfig(layers=2, hidden_dim=64, out_dim=32, last_norm="plain"),
        "objective": MoCoV3Config(temperature=0.2, momentum=0.9, predictor=predictor),
    }
    return _tiny("mocov3-cifar10-r18", data, out, **{**settings, **changes})


def tiny_rotation_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Rotation with SGD on a few convolutions."""
    return _tiny("rotation-cifar10-r18", data, out, **{"encoder": SMALL_ENCODER, **changes})


def tiny_autoencoder_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """A denoising one, with SGD."""
    optim = OptimConfig(name="sgd", base_lr=0.1)
    objective = AutoencoderConfig(given="noisy")
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2")
    settings = {"encoder": encoder, "objective": objective, "optim": optim}
    return _tiny("autoencoder-cifar10-r18", data, out, **{**settings, **changes})


def tiny_vae_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """A small code, with SGD."""
    optim = OptimConfig(name="sgd", base_lr=0.1)
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2")
    settings = {"encoder": encoder, "optim": optim, "objective": VAEConfig(code=8)}
    return _tiny("vae-cifar10-r18", data, out, **{**settings, **changes})


def tiny_inpainting_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Patches, with SGD."""
    optim = OptimConfig(name="sgd", base_lr=0.1)
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2")
    objective = InpaintingConfig(patch=8, power=2)
    settings = {"encoder": encoder, "optim": optim, "objective": objective}
    return _tiny("inpainting-cifar10-r18", data, out, **{**settings, **changes})


def tiny_context_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """The context encoder with its adversary."""
    objective = InpaintingConfig(hidden="centre", power=2, adversarial=0.1)
    return tiny_inpainting_config(data, out, **{"objective": objective, **changes})


def tiny_colourisation_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Cells, with all of their weights from the counts."""
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2", sees="grey")
    settings = {"encoder": encoder, "objective": ColourisationConfig(uniform=0.1)}
    return _tiny("colourisation-cifar10-r18", data, out, **{**settings, **changes})


def tiny_mae_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """One block of a decoder."""
    encoder = EncoderConfig(name="tests.trainer.runs:small_vit", image_size=32)
    settings = {"encoder": encoder, "objective": MAEConfig(width=32, depth=1)}
    return _tiny("mae-cifar10-vitti4", data, out, **{**settings, **changes})


def tiny_supervised_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Three classes."""
    return _tiny("supervised-cifar10-r18", data, out, **{"encoder": SMALL_ENCODER, **changes})


def tiny_cpc_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """From four sides, one row ahead and two."""
    objective = CPCConfig(patch=12, nearest=1, furthest=2, dim=16)
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2", norm="layer")
    settings = {"encoder": encoder, "objective": objective, "crop": CropConfig(size=24)}
    optim = OptimConfig(name="sgd", base_lr=0.1)
    return _tiny("cpc-cifar10-r18", data, out, **{**settings, "optim": optim, **changes})


def tiny_gan_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """A small code, with SGD."""
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2", norm="layer")
    optim = OptimConfig(name="sgd", base_lr=0.1)
    settings = {"encoder": encoder, "optim": optim, "objective": GANConfig(code=8)}
    return _tiny("gan-cifar10-r18", data, out, **{**settings, **changes})


def tiny_bigan_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """The generator's inverse, with BatchNorm."""
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2")
    objective = GANConfig(code=8, learns="inverse")
    return tiny_gan_config(data, out, **{"encoder": encoder, "objective": objective, **changes})


def tiny_supcon_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SimCLR's head on a few convolutions."""
    head = HeadConfig(hidden_dim=64, out_dim=32)
    settings = {"encoder": SMALL_ENCODER, "head": head}
    return _tiny("supcon-cifar10-r18", data, out, **{**settings, **changes})


def tiny_joint_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SimCLR, rotation of a small view, and a memory bank."""
    tasks = (
        TaskConfig(task=SimCLRConfig(temperature=0.5)),
        TaskConfig(task=RotationConfig(), weight=0.4, side=16, scale=(0.3, 0.9)),
        TaskConfig(task=NPIDConfig(), weight=0.1),
    )
    settings = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(hidden_dim=64, out_dim=32),
        "objective": JointConfig(tasks=tasks),
    }
    return _tiny("essl-cifar10-r18", data, out, **{**settings, **changes})


def tiny_jigsaw_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Two orders an image, of 20."""
    objective = JigsawConfig(permutations=20, orders=2, tile=7, width=16)
    settings = {"encoder": SMALL_ENCODER, "objective": objective, "crop": CropConfig(size=30)}
    return _tiny("jigsaw-stl10-r18", data, out, **{**settings, **changes})


def tiny_relativepatch_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """With a colour of each tile alone."""
    objective = RelativePatchConfig(tile=7, width=16, colours="drop")
    settings = {"encoder": SMALL_ENCODER, "objective": objective, "crop": CropConfig(size=30)}
    return _tiny("relativepatch-stl10-r18", data, out, **{**settings, **changes})


def tiny_frameorder_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Four frames of one colour each, of the images that ``data`` was packed of."""
    clips = data.with_name("clips.beton")
    if not clips.exists():
        source = str(data.parent / "images")
        pack(source, clips, PackConfig(clips=True, workers=1), progress=False)
    objective = FrameOrderConfig(task="order", gap=(1, 8), width=16, colours="split")
    encoder = EncoderConfig(name="resnet8", stem="cifar-stride2")
    settings = {"encoder": encoder, "objective": objective}
    return _tiny("frameorder-movingdigits", clips, out, **{**settings, **changes})


def tiny_npid_config(
    data: Path,
    out: Path,
    negatives: int = 0,
    estimate: Any = "softmax",
    memory_bits: Any = 32,
    **changes: Any,
) -> RunConfig:
    """NPID with its bank, against all rows or some."""
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(layers=1, out_dim=16, last_norm="none"),
        "objective": NPIDConfig(
            temperature=0.2, negatives=negatives, estimate=estimate, memory_bits=memory_bits
        ),
    }
    return _tiny("npid-cifar10-r18", data, out, **{**settings, **changes})


def tiny_pirl_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """PIRL with a jigsaw, against all rows."""
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(layers=1, out_dim=16, last_norm="none"),
        "objective": PIRLConfig(
            temperature=0.2, negatives=0, second_crop=CropConfig(size=30), tile=8
        ),
    }
    return _tiny("pirl-cifar10-r18", data, out, **{**settings, **changes})


def tiny_deepclusterv2_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """DeepCluster-v2 with two heads and two small views."""
    small = CropConfig(size=16, scale=(0.05, 0.3))
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none"),
        "objective": DeepClusterV2Config(
            prototypes=7, heads=2, small_views=2, small_crop=small, iterations=4
        ),
    }
    return _tiny("deepclusterv2-cifar10-r18", data, out, **{**settings, **changes})


def tiny_sela_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SeLa with two heads and two small views."""
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none"),
        "objective": SeLaConfig(
            prototypes=7,
            heads=2,
            small_views=2,
            small_crop=CropConfig(size=16, scale=(0.05, 0.3)),
            iterations=20,
        ),
    }
    return _tiny("sela-cifar10-r18", data, out, **{**settings, **changes})


def tiny_deepcluster_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """DeepCluster with seven clusters of six components."""
    settings = {
        "encoder": SMALL_ENCODER,
        "objective": DeepClusterConfig(clusters=7, components=6, iterations=4),
    }
    return _tiny("deepcluster-cifar10-r18", data, out, **{**settings, **changes})


def tiny_byol_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """BYOL with LARS and views of two kinds."""
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none")
    objective = BYOLConfig(momentum=0.9, predictor=head)
    settings = {"encoder": SMALL_ENCODER, "head": head, "objective": objective}
    return _tiny("byol-cifar10-r18", data, out, **{**settings, **changes})


def tiny_nnclr_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """NNCLR with a queue that goes round."""
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none")
    objective = NNCLRConfig(queue=40, predictor=head)
    settings = {"encoder": SMALL_ENCODER, "head": head, "objective": objective}
    return _tiny("nnclr-cifar10-r18", data, out, **{**settings, **changes})


def tiny_simsiam_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SimSiam with SGD on biases too."""
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="plain")
    objective = SimSiamConfig(predictor=dataclasses.replace(head, hidden_dim=8, last_norm="none"))
    settings = {"encoder": SMALL_ENCODER, "head": head, "objective": objective}
    config = _tiny("simsiam-cifar10-r18", data, out, **{**settings, **changes})
    return dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, steady=("predictor",))
    )


def tiny_vicreg_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """VICReg with LARS."""
    head = HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none", linear_bias="never")
    return _tiny(
        "vicreg-cifar10-r18", data, out, **{"encoder": SMALL_ENCODER, "head": head, **changes}
    )


def tiny_swav_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """SwAV with small views, prototypes that wait for a step, and a queue from the third on."""
    small = CropConfig(size=16, scale=(0.05, 0.3))
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(layers=2, hidden_dim=32, out_dim=16, last_norm="none"),
        "objective": SwAVConfig(
            prototypes=7,
            small_views=2,
            small_crop=small,
            frozen_steps=1,
            queue=40,
            queue_from=2,
        ),
    }
    return _tiny("swav-cifar10-r18", data, out, **{**settings, **changes})


def tiny_dino_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """DINO with small views and schedules that reach their ends, AdamW and its weight decay's."""
    head = RECIPES["dino-cifar10-r18"]().head
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": dataclasses.replace(head, hidden_dim=32, out_dim=16),
        "objective": DINOConfig(
            directions=20,
            teacher_warmup_steps=3,
            momentum=0.9,
            frozen_steps=1,
            small_views=2,
            small_crop=CropConfig(size=16, scale=(0.05, 0.3)),
        ),
        "optim": OptimConfig(name="adamw", base_lr=0.001, weight_decay=0.04, clip_norm=0.5),
        "schedule": ScheduleConfig(warmup_epochs=0.4, final_weight_decay=0.4),
    }
    return _tiny("dino-cifar10-r18", data, out, **{**settings, **changes})


def tiny_ibot_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """iBOT with a transformer of 16 patches, of which up to six are hidden."""
    head = RECIPES["ibot-cifar10-vitti4"]().head
    settings: dict[str, Any] = {
        "encoder": EncoderConfig(name="tests.trainer.runs:small_vit", image_size=32),
        "head": dataclasses.replace(head, hidden_dim=32, out_dim=16),
        "objective": IBOTConfig(
            directions=20,
            teacher_warmup_steps=3,
            momentum=0.9,
            frozen_steps=1,
            hidden=(0.1, 0.4),
            small_views=2,
            small_crop=CropConfig(size=16, scale=(0.05, 0.3)),
        ),
    }
    return _tiny("ibot-cifar10-vitti4", data, out, **{**settings, **changes})


def tiny_barlowtwins_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Barlow Twins with LARS, a projector of three layers and views of two kinds."""
    settings: dict[str, Any] = {
        "encoder": SMALL_ENCODER,
        "head": HeadConfig(
            layers=3, hidden_dim=32, out_dim=16, last_norm="none", linear_bias="never"
        ),
        "objective": BarlowTwinsConfig(scale=0.1),
    }
    return _tiny("barlowtwins-cifar10-r18", data, out, **{**settings, **changes})


def _tiny(recipe: str, data: Path, out: Path, **changes: Any) -> RunConfig:
    config = dataclasses.replace(
        RECIPES[recipe](),
        data=DataConfig(train=(data,)),
        out=out,
        batch=24,
        steps=6,
        precision="fp32",
        device="cpu",
        log_samples=True,
        crop=CropConfig(size=32, scale=(0.2, 1.0)),
        encoder=EncoderConfig(name="resnet18", zero_init_residual=True),
        schedule=ScheduleConfig(warmup_epochs=1),
        loader=LoaderConfig(backend="torchvision", workers=1),
        checkpoint=CheckpointConfig(every_epochs=0),
        telemetry=TelemetryConfig(tensorboard=False, log_every=3),
    )
    return dataclasses.replace(config, **changes)
