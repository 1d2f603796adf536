"""Every objective's configuration, but for several at once: what stands here can be trained, alone
or jointly; nothing else names one."""

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
from trainer.objectives.supcon import SupConConfig
from trainer.objectives.supervised import SupervisedConfig
from trainer.objectives.swav import SwAVConfig
from trainer.objectives.vae import VAEConfig
from trainer.objectives.vicreg import VICRegConfig

# The first one is what a configuration without a name means: those of before there were others.
AnyTaskConfig = (
    SimCLRConfig
    | MoCoConfig
    | MoCoV3Config
    | NNCLRConfig
    | RotationConfig
    | NPIDConfig
    | PIRLConfig
    | DeepClusterConfig
    | DeepClusterV2Config
    | SeLaConfig
    | SwAVConfig
    | DINOConfig
    | IBOTConfig
    | BarlowTwinsConfig
    | BYOLConfig
    | SimSiamConfig
    | VICRegConfig
    | JigsawConfig
    | RelativePatchConfig
    | FrameOrderConfig
    | AutoencoderConfig
    | InpaintingConfig
    | ColourisationConfig
    | CPCConfig
    | MAEConfig
    | VAEConfig
    | GANConfig
    | SupervisedConfig
    | SupConConfig
)
