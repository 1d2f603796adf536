"""Which code made a file: versions and commit, for the JSON beside results and weights."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch
import torchvision


def versions() -> dict[str, str | None]:
    """Versions of this program, its commit, and the libraries that numbers depend on."""
    return {
        "widebatch": importlib.metadata.version("widebatch"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _commit() -> str | None:
    """The commit of the checkout that this code lies in, or None outside one.

    ``+changes`` is added when tracked files differ from it.
    """
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *describe],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
