"""For tasks in which an image, or a patch, must not hear of the others of its batch."""

from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from trainer.models.encoders import Encoder


def check_alone(encoder: Encoder) -> None:
    """Refuse an encoder whose features of an image depend on others.

    Raises:
        ConfigError: it has BatchNorm.
    """
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            "--encoder.norm batch: statistics over a batch would tell of an image's company, which"
            " gives this task's answers away; set --encoder.norm layer"
        )
