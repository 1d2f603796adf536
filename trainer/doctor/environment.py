"""Software and devices of this process."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch
from packaging.requirements import Requirement

from common.cores import decoding_threads, own_cores
from data_pipeline.reading.ffcv_compat import ffcv_problem
from trainer.doctor.finding import Finding, judged
from trainer.parallel.machine import agreed_share, has_bf16


def versions() -> Iterator[Finding]:
    """Installed packages against what this project asks for."""
    yield Finding("python", "good", platform.python_version())
    wrong = []
    for text in importlib.metadata.requires("widebatch") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        # Not the build after the plus sign: 2.14.1+cu130 is 2.14.1.
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
    said = "; ".join(wrong) or f"as asked for; torch {torch.__version__}"
    yield judged("packages", not wrong, said, "bad", "make setup, or pip install -e .")


def ffcv() -> Iterator[Finding]:
    """Whether FFCV's library loads here."""
    problem = ffcv_problem()
    said = f"{problem}; the slower torchvision loader will serve" if problem else "loads"
    yield judged("ffcv", not problem, said, "note", "make setup, as root or with sudo")


def cores(device: torch.device) -> Iterator[Finding]:
    """This process's share of its machine's cores. A collective."""
    mine, share = own_cores(), agreed_share()
    threads = decoding_threads(share, device.type == "cuda")
    quota = f", a quota of {min(mine.quotas.values()):g}" if mine.quotas else ""
    said = (
        f"{share} for this process, which may run on {len(mine.cpus)} of {os.cpu_count()} CPUs"
        f"{quota}; {threads} decode images"
    )
    yield Finding("cores", "good", said)


def device() -> Iterator[Finding]:
    """The GPU of this process, or what a CPU can do instead."""
    if not torch.cuda.is_available():
        yield Finding("device", "note", f"no GPU; {_arithmetic('cpu')}")
        return
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    said = f"{properties.name}, {total / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    yield Finding("device", "good", said)
    if free < 0.9 * total:
        yield Finding(
            "gpu memory",
            "note",
            f"{(total - free) / 2**30:.1f} GiB are in use by others",
            "nvidia-smi says by whom",
        )
    yield Finding("arithmetic", "good" if has_bf16("cuda")[0] else "note", _arithmetic("cuda"))


def _arithmetic(device_type: str) -> str:
    has, why = has_bf16(device_type)
    return f"{why}: --precision auto is {'bf16' if has else 'fp32'}"
