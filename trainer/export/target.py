"""What there has to be for a library, so that an export to it can be written and proven."""

import abc
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import nn

from common.errors import ConfigError, NumericalError
from common.files.safetensors_file import Tensors, parse_safetensors
from trainer.evaluation.load_encoder import Preprocessing
from trainer.models.encoders import EncoderConfig, is_resnet

Features = Callable[[torch.Tensor], torch.Tensor]
"""Images (N, 3, H, W) of the target's ``dtype`` to features (N, F)."""

RESNETS = tuple(filter(is_resnet, torchvision.models.list_models(module=torchvision.models)))
"""torchvision's, which other libraries have too."""


class ResNetShape(NamedTuple):
    """What other libraries are told of one of torchvision's ResNets."""

    depth: int
    """Layers. Below 50 a block is basic, else a bottleneck."""
    blocks: list[int]
    """Of each stage."""
    groups: int
    width: int
    """Of a group."""


def resnet_shape(name: str) -> ResNetShape:
    """Of the ResNet that torchvision has under the name."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    blocks = [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    layers = 3 if hasattr(model.layer1[0], "conv3") else 2
    return ResNetShape(2 + layers * sum(blocks), blocks, model.groups, model.base_width)


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

        ``model`` is the encoder, float32, in evaluation mode; ``tensors`` its ``state_dict``,
        contiguous on the CPU.
        """

    @abc.abstractmethod
    def load(self, written: Path | bytes) -> Features:
        """The features of the library's own model, of the folder or of the file's content.

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

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the packages that took part in the proof."""
        return {name: importlib.metadata.version(name) for name in ("torch", *cls.packages)}

    def absent(self, package: str, error: ImportError) -> ConfigError:
        """The one line for a library that is not there: it is never a requirement of ours."""
        return ConfigError(
            f"--format {self.name}: needs {package}, which is not one of Widebatch's own "
            f"requirements ({error}); install it: python -m pip install {package}"
        )

    def refused(self, what: str) -> "RefusedError":
        """The reason in the form of all others; ``export`` adds who can."""
        return RefusedError(f"--format {self.name}: {what}")


class RefusedError(ConfigError):
    """An encoder that a target cannot express; says why."""


class WeightsFile(Target):
    """A safetensors file for ``load_state_dict`` of a model that the library builds."""

    suffix = ".safetensors"
    packages: ClassVar[tuple[str, ...]] = ("safetensors",)
    classifier: str = ""
    """Path of the layer that the library's model has and the file does not; empty: none."""

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """The library's own, with random weights."""

    def renamed(self, tensors: Tensors) -> Tensors:
        """The encoder's tensors by the library's names; torchvision's own, unless overridden."""
        return tensors

    def named_for(self, model: nn.Module, written: bytes) -> Tensors:
        """What the file holds, by the names of ``model``."""
        return parse_safetensors(written, Path("export"))

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """The one file."""
        return {"": safetensors.torch.save(self.renamed(tensors))}

    def load(self, written: Path | bytes) -> Features:
        """The library's model with every tensor but the classifier's, which becomes an identity."""
        assert isinstance(written, bytes)  # noqa: S101  (a file's target)
        model = self.model()
        try:
            missing, unexpected = model.load_state_dict(
                self.named_for(model, written), strict=False
            )
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise NumericalError(f"export: {problem}; nothing was written") from None
        wanted = [name for name in missing if name.rpartition(".")[0] != self.classifier]
        if unexpected or wanted:
            raise NumericalError(
                f"export: {self.built_by} misses {sorted(wanted)} and does not know "
                f"{sorted(unexpected)}; nothing was written"
            )
        if self.classifier:
            parent, _, name = self.classifier.rpartition(".")
            model.get_submodule(parent).add_module(name, nn.Identity())
        return model.to(self.dtype).eval()
