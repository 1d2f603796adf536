"""What a run takes of its machines where nothing is asked for: threads, and their arithmetic.

The cores of a machine are divided among the processes of a run on it. bf16 halves memory and time
on processors that compute in it, and takes 2 to 9 times the time of fp32 on those that only convert
to it.
"""

import dataclasses
import logging
import os
import typing
from dataclasses import asdict

import torch
from lightning_fabric import Fabric

from common.collectives import all_gather_json, broadcast_json
from common.cores import Cores, cores_alone, decoding_threads, own_cores, share_of_cores
from common.errors import DataError
from common.files.strict_json import read_json_file
from data_pipeline.reading.pool import LoaderConfig
from trainer.config import RunConfig
from trainer.parallel.strategy import PrecisionName, compute_in

log = logging.getLogger(__name__)

# As torch.cpu.get_capabilities() names them; "bf16" is Arm's.
_OF_PROCESSORS = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
# What oneDNN may be held to by the environment, and the values that leave them out.
_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BF16 = frozenset(
    ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
)


def agreed_share() -> int:
    """Cores that this process may keep busy beside the others of its machine. A collective."""
    mine = own_cores()
    return share_of_cores(mine, [Cores(**each) for each in all_gather_json(asdict(mine))])


def settle_threads(loader: LoaderConfig, device: torch.device) -> LoaderConfig:
    """Give loaders, and torch's own operations, their threads. A collective.

    Args:
        loader: says how many threads decode, or leaves it to this process's share of the cores.
        device: of this process; beside a GPU two cores of the share decode nothing.

    Returns:
        ``loader`` with a number of threads. torch gets no more than the share, unless
        ``OMP_NUM_THREADS`` names another number than all that this process sees.
    """
    share = agreed_share()
    if os.environ.get("OMP_NUM_THREADS") in (None, "", str(cores_alone())):
        torch.set_num_threads(min(share, torch.get_num_threads()))
    workers = loader.workers or decoding_threads(share, device.type == "cuda")
    return dataclasses.replace(loader, workers=workers)


def has_bf16(device_type: str) -> tuple[bool, str]:
    """Whether this machine's ``cuda`` or ``cpu`` computes in bf16, and how that is known."""
    if device_type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return has, f"this GPU has {'bf16' if has else 'no bf16'}"
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in _OF_PROCESSORS if capabilities.get(name)]
    if not found:
        return False, "this processor has no bf16"
    for name in _CAPS:
        cap = os.environ.get(name, "").upper()
        if cap in _WITHOUT_BF16:
            return False, f"{name}={cap} hides the processor's {found[0]}"
    return True, f"this processor has {found[0]}"


def with_precision(config: RunConfig, device_type: str) -> RunConfig:
    """``config``, its precision chosen for this machine where it is ``auto``."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if has_bf16(device_type)[0] else "fp32")


def settled(config: RunConfig, fabric: Fabric) -> RunConfig:
    """``config`` with the precision that all processes take, ``fabric`` too. A collective.

    A run that goes on keeps what it was begun with. A new one takes what the processor of rank 0
    has: processes may run on several kinds.
    """
    has, why = has_bf16(fabric.device.type)
    if config.precision == "auto":
        saved = _saved(config)
        chosen = broadcast_json(saved or ("bf16" if has else "fp32"))
        config = dataclasses.replace(config, precision=chosen)
        if fabric.is_global_zero:
            log.info("precision %s: %s", chosen, "as the run began" if saved else why)
    if config.precision == "bf16" and not has and fabric.is_global_zero:
        log.warning("--precision bf16: %s: fp32 takes a half to a ninth of the time", why)
    compute_in(fabric, config.precision)
    return config


def _saved(config: RunConfig) -> PrecisionName | None:
    """That of the run in the folder; None where there is none, or none to be read."""
    try:
        saved = read_json_file(config.out / "config.json").get("precision")
    except (DataError, OSError):  # what is wrong with it is said where it is compared
        return None
    return saved if saved in typing.get_args(PrecisionName) and saved != "auto" else None
