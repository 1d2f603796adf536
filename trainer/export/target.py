"""What there has to be for a library, so that an export to it can be written and proven."""

import abc
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from common.errors import ConfigError, NumericalError
from trainer.evaluation.load_encoder import Preprocessing
from trainer.models.encoders import EncoderConfig

Tensors = dict[str, torch.Tensor]
Features = Callable[[torch.Tensor], torch.Tensor]
"""Images (N, 3, H, W) of the target's ``dtype`` to features (N, F)."""


class Target(abc.ABC):
    """One encoder on its way into one library."""

    name: ClassVar[str]
    """Of ``--format``."""
    built_by: ClassVar[str]
    """Who computes the features that the proof compares, in words."""
    suffix: ClassVar[str]
    """Of the file; empty: a folder."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Whose versions the proof names, beside torch's."""
    dtype: ClassVar[torch.dtype] = torch.float64
    """Of the target's arithmetic in the proof."""
    # Models that compute in float64 what training computed in float32 or less: any difference
    # beyond the order of additions means that they are not the same function.
    tolerance: ClassVar[float] = 1e-9
    """Of the largest difference, over the largest feature."""

    def __init__(self, encoder: EncoderConfig, preprocessing: Preprocessing) -> None:
        """Decide whether and how the library can hold the encoder.

        Raises:
            RefusedError: it cannot.
        """
        self.encoder = encoder
        self.preprocessing = preprocessing

    @abc.abstractmethod
    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """Contents of files by name; of the one file by the empty name, if it is no folder.

        Args:
            model: the encoder, float32, in evaluation mode.
            tensors: its ``state_dict``, contiguous on the CPU.
        """

    @abc.abstractmethod
    def load(self, written: Path | bytes) -> Features:
        """The features of the library's own model, in evaluation mode.

        Args:
            written: the folder, or the content of the file.

        Raises:
            ConfigError: the library is not installed.
            NumericalError: it does not take what was written.
        """

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON values: what its user has to know of the model that takes the weights."""

    @abc.abstractmethod
    def instructions(self, name: str) -> list[str]:
        """Lines of Python that load what was written as ``name``."""

    def versions(self) -> dict[str, str]:
        """Of the packages that took part in the proof."""
        return {name: importlib.metadata.version(name) for name in ("torch", *self.packages)}


def absent(target: str, package: str, error: ImportError) -> ConfigError:
    """The one line for a library that is not there: it is never a requirement of ours."""
    return ConfigError(
        f"--format {target}: needs {package}, which is not one of Widebatch's own requirements "
        f"({error}); install it: python -m pip install {package}"
    )


class RefusedError(ConfigError):
    """An encoder that a target cannot express; says why."""


def refused(target: str, what: str) -> RefusedError:
    """The reason in the form of all others; :func:`trainer.export.export` adds who can."""
    return RefusedError(f"--format {target}: {what}")


def fill_exactly(model: nn.Module, tensors: Tensors, left_out: set[str], who: str) -> None:
    """Load ``tensors`` so that only ``left_out`` stays as it was.

    Raises:
        NumericalError: other keys are missing, some are too many, or shapes differ.
    """
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise NumericalError(f"export: {problem}; nothing was written") from None
    if unexpected or set(missing) != left_out:
        raise NumericalError(
            f"export: {who} misses {sorted(set(missing) - left_out)} and does not know "
            f"{sorted(unexpected)}; nothing was written"
        )
