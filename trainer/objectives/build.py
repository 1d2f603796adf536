"""Which objective a configuration means."""

from trainer.models.encoders import Encoder
from trainer.models.heads import ProjectionHead
from trainer.objectives.base import Objective
from trainer.objectives.moco import MoCo, MoCoConfig
from trainer.objectives.mocov3 import MoCoV3, MoCoV3Config
from trainer.objectives.simclr import SimCLR, SimCLRConfig

# The first one is what a configuration without a name means: those of before there were others.
ObjectiveConfig = SimCLRConfig | MoCoConfig | MoCoV3Config


def make_objective(
    encoder: Encoder, head: ProjectionHead, config: ObjectiveConfig, seed: int
) -> Objective:
    """The objective of ``config``; what it adds to the networks draws from torch's generator.

    Args:
        encoder: what is pretrained.
        head: from its features to projections.
        config: of the objective.
        seed: of what the objective draws in each step.

    Raises:
        ConfigError: the head does not fit the settings.
    """
    if isinstance(config, MoCoConfig):
        return MoCo(encoder, head, config, seed)
    if isinstance(config, MoCoV3Config):
        return MoCoV3(encoder, head, config)
    return SimCLR(encoder, head, config)
