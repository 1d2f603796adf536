"""What the surroundings bring that is not the run's: other libraries' variables, odd terminals."""

import io
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

log = logging.getLogger(__name__)

_LIGHTNING = "Lightning would take it for a setting of ours"
_ONE_CORE = "it ties all threads of a process to one core, those that decode among them"
_ROUNDED = "it would round fp32 to fewer digits, against --precision"
_NOT_OBEYED = {
    "PROMETHEUS_MULTIPROC_DIR": "the endpoint would serve other programs' numbers",
    "prometheus_multiproc_dir": "the endpoint would serve other programs' numbers",
    "NUMBA_DISABLE_JIT": "the loader's code has to be compiled",
    "NVIDIA_TF32_OVERRIDE": _ROUNDED,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _ROUNDED,
    "ONEDNN_DEFAULT_FPMATH_MODE": _ROUNDED,
    "DNNL_DEFAULT_FPMATH_MODE": _ROUNDED,
    "OMP_PROC_BIND": _ONE_CORE,
    "OMP_PLACES": _ONE_CORE,
    "GOMP_CPU_AFFINITY": _ONE_CORE,
    "KMP_AFFINITY": _ONE_CORE,
    "LT_ACCELERATOR": _LIGHTNING,
    "LT_DEVICES": _LIGHTNING,
    "LT_NUM_NODES": _LIGHTNING,
    "LT_PRECISION": _LIGHTNING,
    "LT_STRATEGY": _LIGHTNING,
}
"""Variables that change a run's numbers, break it or slow it down unasked, and how."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x80, 0xA0))}
_IN_LINES = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\t\n"}
_TO_ANOTHER_BAR = re.compile(r"(?:\n|\x1b\[A)*")


def leave_out(environ: MutableMapping[str, str] = os.environ) -> None:
    """Take variables away that a run does not obey, before the libraries look that do; say so.

    For network and hardware (``NCCL_*``, ``CUDA_*``) and the number of threads the user's word
    stands.
    """
    speaks = (environ.get("RANK") or environ.get("SLURM_PROCID") or "0") == "0"
    for name, why in _NOT_OBEYED.items():
        value = environ.pop(name, None)
        if value is not None and speaks:
            log.warning("%s=%s in the environment is not obeyed: %s", name, value, why)


def make_printable() -> None:
    r"""Write to the terminal what its encoding lacks, and what would steer it, as ``\x1b``."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Harmless(stream))


def printable(text: str) -> str:
    r"""A text on one line: what would steer a terminal, and ends of lines, as ``\x1b``."""
    return text.translate(_CONTROLS)


class Harmless:
    """A stream to a terminal that no name of a file steers; tqdm's bars are written as they are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, and return how many letters."""
        if text.startswith("\r"):  # a bar
            text = "\r" + printable(text[1:])
        elif not _TO_ANOTHER_BAR.fullmatch(text):
            text = text.translate(_IN_LINES)
        return self.stream.write(text)
