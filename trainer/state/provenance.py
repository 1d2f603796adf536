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
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def commit() -> str | None:
    """The commit of the checkout that this code lies in, or None outside one.

    ``+changes`` is added when tracked files differ from it.
    """
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
