"""Lightning Fabric: device, precision and the process group behind one object.

Fabric would work out the launcher by itself, but its guess depends on job names and device counts;
:class:`TorchEnvironment` tells it what ``launch.cluster`` has found, by torch's own variables.
"""

import logging
import os
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import ClusterEnvironment
from lightning_fabric.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning_fabric.strategies import DDPStrategy

from trainer.errors import ConfigError

PrecisionName = Literal["bf16", "fp32", "fp64"]


class _Bf16(MixedPrecision):
    """Fabric's bf16 autocast, without its copies of inputs and outputs to fp32 and back.

    Views come in bf16 already, and the loss takes projections as they are.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device=device)

    def convert_input(self, data: Any) -> Any:
        """Views are in the compute dtype already."""
        return data

    def convert_output(self, data: Any) -> Any:
        """The loss reduces in fp32 by itself."""
        return data


class _Fp64(DoublePrecision):
    """Fabric's double precision, without rounding every output to fp32."""

    def convert_output(self, data: Any) -> Any:
        """Projections stay in float64, so that the loss is one."""
        return data


def _precision(name: PrecisionName, device: str) -> Precision:
    if name == "bf16":
        return _Bf16(device)
    return _Fp64() if name == "fp64" else Precision()


class TorchEnvironment(ClusterEnvironment):
    """Processes that exist already and know their place from torch's environment variables."""

    @property
    def creates_processes_externally(self) -> bool:
        """Fabric starts no process: torchrun or srun did."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0's store."""
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """Port of rank 0's store."""
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        """Whether this environment applies here."""
        return "RANK" in os.environ

    def world_size(self) -> int:
        """Processes of the run."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def set_world_size(self, size: int) -> None:
        """Fabric's own count must be the launcher's."""
        if size != self.world_size():
            raise ValueError(f"{size} processes configured, {self.world_size()} started")

    def global_rank(self) -> int:
        """This process among all."""
        return int(os.environ.get("RANK", "0"))

    def set_global_rank(self, rank: int) -> None:
        """Fabric's own count must be the launcher's."""
        if rank != self.global_rank():
            raise ValueError(f"rank {rank} computed, started as {self.global_rank()}")

    def local_rank(self) -> int:
        """This process among those of its node."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        """This node among all."""
        return int(os.environ.get("GROUP_RANK", "0"))


def launch_fabric(device: Literal["auto", "cpu", "cuda"], precision: PrecisionName) -> Fabric:
    """Join the run's process group, if there is one, and choose this process's device.

    Args:
        device: ``auto`` takes this process's GPU where there is one.
        precision: arithmetic of the forward pass.

    Raises:
        ConfigError: this process sees fewer GPUs than there are processes on its node.
    """
    # Fabric sets its logger to INFO when it is imported; what it says there we say ourselves.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if use_cuda and torch.cuda.device_count() < local_world_size:
        raise ConfigError(
            f"{local_world_size} processes share this node but each sees"
            f" {torch.cuda.device_count()} GPUs: start one process per GPU, and let every process"
            " see all of them (Slurm: --gpus-per-node, not --gpus-per-task)"
        )
    strategy: Any = "auto"
    if "RANK" in os.environ:
        strategy = DDPStrategy(
            process_group_backend="nccl" if use_cuda else "gloo",
            forward_sync_buffers=False,  # synchronised BatchNorm keeps them equal
            gradient_as_bucket_view=True,
        )
    fabric = Fabric(
        accelerator="cuda" if use_cuda else "cpu",
        devices=local_world_size,
        num_nodes=max(1, world_size // local_world_size),
        strategy=strategy,
        plugins=[_precision(precision, "cuda" if use_cuda else "cpu"), TorchEnvironment()],
    )
    fabric.launch()
    return fabric
