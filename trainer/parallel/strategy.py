"""Lightning Fabric: device, precision, strategy and the process group behind one object.

Fabric would work out the launcher by itself, but its guess depends on job names and device counts:
it is told to read torch's own variables, which say what ``launch.cluster`` has found.
"""

import logging
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning_fabric.strategies import DDPStrategy, Strategy

from common.errors import ConfigError
from common.rendezvous import JOIN_TIMEOUT, join
from trainer.models.encoders import EncoderConfig
from trainer.objectives.base import Objective
from trainer.optim.optimizers import OptimConfig
from trainer.parallel.sharding import Sharding

PrecisionName = Literal["auto", "bf16", "fp32", "fp64"]
StrategyName = Literal["ddp", "fsdp", "deepspeed-1", "deepspeed-2"]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """What every process holds of the training state; one process holds all of it anyway.

    With LARS, SGD and AdamW the steps are those of ddp, up to rounding, and a checkpoint of one
    goes on under another.
    """

    name: Annotated[StrategyName, tyro.conf.arg(name="strategy")] = "ddp"
    """ddp: every process holds everything. fsdp (FSDP2): a share of weights, gradients and
    optimizer state; weights are gathered block by block when they are needed. deepspeed-1 (ZeRO-1):
    a share of the optimizer state. deepspeed-2 (ZeRO-2): of gradients too."""
    compress_gradients: Literal["none", "bf16"] = "none"
    """What gradients are while they travel: bf16 sends half the bytes and rounds them, so that the
    number of processes changes them by some 0.4 %."""


class _Unconverted:
    """Inputs and outputs stay as they are, where Fabric's precisions cast and copy them.

    Views come in the compute dtype already, and the loss takes projections as they are.
    """

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data

    def convert_output(self, data: Any) -> Any:
        """As it is."""
        return data


class _Bf16(_Unconverted, MixedPrecision): ...


class _Fp64(_Unconverted, DoublePrecision): ...


def _precision(name: PrecisionName, device: str) -> Precision:
    if name == "bf16":
        return _Bf16("bf16-mixed", device=device)
    return _Fp64() if name == "fp64" else Precision()


def compute_in(fabric: Fabric, precision: PrecisionName) -> None:
    """Have ``fabric`` compute in ``precision``. Before it wraps a network."""
    fabric.strategy.precision = fabric._precision = _precision(precision, fabric.device.type)


def launch_fabric(
    device: Literal["auto", "cpu", "cuda"],
    precision: PrecisionName,
    config: StrategyConfig | None = None,
    join_timeout: float = JOIN_TIMEOUT,
) -> Fabric:
    """Join the run's process group, if there is one, and choose this process's device.

    Args:
        device: ``auto`` takes this process's GPU where there is one.
        precision: arithmetic of the forward pass; ``auto``: fp32 until :func:`compute_in`.
        config: how training state is shared out, by default not at all.
        join_timeout: seconds to wait for the other processes; 0: for ever.

    Raises:
        ConfigError: this process sees fewer GPUs than there are processes on its node, or the
            strategy's package is missing or another version.
        RankLostError: the other processes did not come, or could not be connected.
    """
    # Fabric sets its logger to INFO when it is imported; what it says there we say ourselves.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    launched, world_size = "RANK" in os.environ, int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if use_cuda and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda, and torch sees no GPU here: leave it out, or see that 'nvidia-smi'"
            " lists one and that CUDA_VISIBLE_DEVICES does not hide it"
        )
    if use_cuda and torch.cuda.device_count() < local_world_size:
        raise ConfigError(
            f"{local_world_size} processes share this node, and each sees"
            f" {torch.cuda.device_count()} GPUs: start one process per GPU, and let every process"
            " see all of them (Slurm: --gpus-per-node, not --gpus-per-task)"
        )
    fabric = Fabric(
        accelerator="cuda" if use_cuda else "cpu",
        devices=local_world_size,
        num_nodes=max(1, world_size // local_world_size),
        strategy=_strategy(config or StrategyConfig(), world_size, use_cuda),
        plugins=[
            _precision(precision, "cuda" if use_cuda else "cpu"),
            TorchElasticEnvironment() if launched else LightningEnvironment(),
        ],
    )
    if launched:  # Fabric takes a process group that is there
        join("nccl" if use_cuda else "gloo", join_timeout, fabric.device if use_cuda else None)
    fabric.launch()
    return fabric


def _strategy(config: StrategyConfig, world_size: int, use_cuda: bool) -> Strategy | str:
    if "RANK" not in os.environ:
        return "auto"
    backend = "nccl" if use_cuda else "gloo"
    if config.name == "ddp" or world_size == 1:
        return DDPStrategy(
            process_group_backend=backend,
            forward_sync_buffers=False,  # synchronised BatchNorm keeps them equal
            gradient_as_bucket_view=True,
        )
    compress = config.compress_gradients == "bf16"
    if config.name == "fsdp":
        from trainer.parallel.fsdp import fsdp_strategy

        return fsdp_strategy(world_size, backend, compress)
    from trainer.parallel.zero import zero_strategy  # imports DeepSpeed: seconds

    return zero_strategy(1 if config.name == "deepspeed-1" else 2, backend, compress)


def lay_out(
    config: StrategyConfig,
    fabric: Fabric,
    objective: Objective,
    encoder: EncoderConfig,
    optim: OptimConfig,
) -> Sharding:
    """Wrap ``objective``, the same on all processes, and build its optimizer.

    Raises:
        ConfigError: there is nothing to train.
    """
    if config.name == "ddp" or fabric.world_size == 1:
        return Sharding(fabric, objective, optim, config.compress_gradients == "bf16")
    if config.name == "fsdp":
        from trainer.parallel.fsdp import FullySharded

        return FullySharded(fabric, objective, encoder, optim)
    from trainer.parallel.zero import ZeroSharded

    return ZeroSharded(fabric, objective, optim)
