"""How much of the training state each strategy leaves on a process."""

from torch import nn

from trainer.config import RunConfig
from trainer.objectives.base import Objective

_ZERO_BUCKETS = 2 * 2**25  # two of 32 MiB, in which gradients travel


def optimizer_copies(config: RunConfig) -> int:
    """How many values the optimizer keeps for each that it moves."""
    if config.optim.name == "adamw":
        return 2
    return 1 if config.optim.momentum else 0


class Shares:
    """Bytes of training state that a strategy leaves on each process.

    Args:
        config: names the strategy.
        objective: the networks; their largest block counts where weights are gathered.
        size: bytes of all trainable weights.
        world_size: processes.

    Attributes:
        parameters, gradients, optimizer: of what is trained.
        gathered: buffers in which weights or gradients travel.
    """

    def __init__(self, config: RunConfig, objective: Objective, size: int, world_size: int) -> None:
        strategy = config.strategy.name if world_size > 1 else "ddp"
        part = size // world_size
        self.parameters = part if strategy == "fsdp" else size
        self.gradients = part if strategy in ("fsdp", "deepspeed-2") else size
        copies = optimizer_copies(config)
        self.optimizer = copies * (size if strategy == "ddp" else part)
        self.gathered = 0
        if strategy.startswith("deepspeed"):
            self.optimizer += part  # ZeRO updates a copy of its part of the weights
            self.gathered = _ZERO_BUCKETS
        elif strategy == "fsdp":  # the block at work, and the next one on its way
            self.gathered = 2 * max(map(_size_of, objective.encoder.children()))


def _size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad)
