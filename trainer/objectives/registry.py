"""Every objective's configuration. What stands here can be trained; nothing else names one."""

from trainer.objectives.barlowtwins import BarlowTwinsConfig
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.moco import MoCoConfig
from trainer.objectives.mocov3 import MoCoV3Config
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.rotation import RotationConfig
from trainer.objectives.simclr import SimCLRConfig

DefaultObjectiveConfig = SimCLRConfig
"""Of a run that names none."""

# The first one is what a configuration without a name means: those of before there were others.
AnyObjectiveConfig = (
    SimCLRConfig
    | MoCoConfig
    | MoCoV3Config
    | RotationConfig
    | NPIDConfig
    | DeepClusterV2Config
    | BarlowTwinsConfig
)
