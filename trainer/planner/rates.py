"""The rates a plan is made from: stated ones from data sheets, or what a machine measured.

Peaks are the vendors', dense, at boost clock; what share of them training attains is stated beside
them. **Nothing here was measured on a GPU**: a plan says which of its rates are stated, flags
replace any of them, and ``--calibrate`` (:mod:`trainer.planner.calibrate`) replaces most.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its data sheet has it."""

    name: str
    flops: float
    """bfloat16 products with float32 sums, per second."""
    bandwidth: float
    """Device memory, bytes per second."""
    memory: float
    """Bytes that a program can have of the nominal ones."""
    nvlink: float
    """To the GPUs of its node, bytes per second each way."""
    flops_fraction: float
    """Of the peak that convolutions and matrix products attain: the newer the GPU, the less."""
    bandwidth_fraction: float
    """Of the memory bandwidth that all other operations attain."""


_A100 = {"flops": 312e12, "nvlink": 300e9, "flops_fraction": 0.55, "bandwidth_fraction": 0.65}
_H100 = {"flops": 989e12, "nvlink": 450e9, "flops_fraction": 0.35, "bandwidth_fraction": 0.5}
_B200 = {"flops": 2250e12, "nvlink": 900e9, "flops_fraction": 0.25, "bandwidth_fraction": 0.4}

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100-40g", memory=39.4 * GIB, bandwidth=1.56e12, **_A100),
        Gpu(name="a100-80g", memory=79.1 * GIB, bandwidth=2.04e12, **_A100),
        Gpu(name="h100-80g", memory=79.1 * GIB, bandwidth=3.35e12, **_H100),
        Gpu(name="h200-141g", memory=139.8 * GIB, bandwidth=4.8e12, **_H100),
        Gpu(name="b200-180g", memory=178.0 * GIB, bandwidth=8.0e12, **_B200),
    )
}
"""By the names that ``--gpu`` takes."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a machine measured in a few steps of a recipe; seconds are of one process's step."""

    device: str
    """"cpu" or "cuda"."""
    batches: tuple[int, ...]
    """Batches that were run."""
    base_seconds: float
    """Of a step, whatever the batch."""
    image_seconds: float
    """Of a step per image: forward and backward pass and, on the CPU, decoding beside them."""
    augment_seconds: float
    """Per image, both views."""
    loss_seconds: float
    """Per FLOP of the loss's products."""
    update_seconds: float
    """Of optimizer and moving averages."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a plan is made from. Fractions are of the peaks."""

    gpu: Gpu
    augment_fraction: float = 0.25
    """Of the bandwidth that augmentation attains: arithmetic binds it."""
    loss_fraction: float = 0.5
    """Of the peak that the loss's kernels attain, exponentials after products."""
    launch_seconds: float = 8e-6
    """Of the host, to start an operation: a step is never shorter than all its operations'."""
    context_bytes: float = 2.0 * GIB
    """CUDA's context, workspaces of cuDNN and cuBLAS, NCCL's buffers; measured, all that is taken
    before a tensor is."""
    memory_factor: float = 1.06
    """Bytes taken for each byte in use: the allocator's rounding and fragments."""
    nvlink_fraction: float = 0.75
    """Of NVLink's rate that collectives attain."""
    link_bytes: float = 50e9
    """Network of a node, all adapters together, each way, bytes per second."""
    link_fraction: float = 0.8
    """Of the network's rate that collectives attain."""
    node_seconds: float = 20e-6
    """Latency of a collective inside a node."""
    network_seconds: float = 45e-6
    """Latency of a collective across nodes."""
    loader_rate: float = 0.0
    """Images a core decodes and crops in a second; 0: from the sizes of images and crops."""
    cores: float = 12.0
    """Cores for each GPU's loader."""
    calibration: Calibration | None = None
    """Measured times, in place of those that follow from the GPU's rates."""

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.calibration.device if self.calibration else "cuda"


# Nanoseconds of a core for each pixel decoded and for each pixel of a crop, and for an image's
# overhead: from two views of 224 pixels out of 500 x 375, 400 images a second and core.
_DECODE, _CROP, _OVERHEAD = 8e-9, 9e-9, 30e-6


def stated_loader_rate(source_pixels: float, view_pixels: int) -> float:
    """Images a second and core, where none was measured, of a stored image's and all its views'
    pixels."""
    return 1 / (_OVERHEAD + _DECODE * source_pixels + _CROP * view_pixels)
