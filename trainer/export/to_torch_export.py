"""torch.export: the computation itself with its weights, for torch without any model's code.

The ``.pt2`` archive is torch's own format. torch reads the example inputs in it by its restricted
unpickler; nothing of ours does.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, first_sentence
from trainer.evaluation.load_encoder import Preprocessing
from trainer.export.target import Features, Target, Tensors

INPUT = "images"


class ToTorchExport(Target):
    """One ``.pt2`` file: (batch, 3, H, W) float32 to (batch, F), in evaluation mode."""

    name = "torch-export"
    built_by = "the program that torch.export.load gave"
    suffix = ".pt2"
    dtype = torch.float32
    tolerance = 2e-5  # float32 against float64

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """Traced with any number of images."""
        images, dimensions = example(self.preprocessing)
        try:
            program = torch.export.export(model, (images,), dynamic_shapes=dimensions)
        except Exception as error:  # whatever a user's own module makes of it
            raise ConfigError(
                f"--format torch-export: torch cannot export {self.encoder.name}:"
                f" {type(error).__name__}: {first_sentence(error)}"
            ) from error
        archive = io.BytesIO()
        torch.export.save(program, archive)
        return {"": archive.getvalue()}

    def load(self, written: Path | bytes) -> Features:
        """What ``torch.export.load`` gives."""
        assert isinstance(written, bytes)  # noqa: S101  (a file's target)
        program: Features = torch.export.load(io.BytesIO(written)).module()
        return program

    def facts(self) -> dict[str, Any]:
        """Shapes."""
        side = self.preprocessing.size
        return {"input": {"shape": ["batch", 3, side, side], "dtype": "float32"}}

    def instructions(self, name: str) -> list[str]:
        """For features."""
        return [
            "import torch",
            "",
            f"model = torch.export.load({name!r}).module()",
            "features = model(images)  # float32, see `preprocessing`",
        ]


def example(preprocessing: Preprocessing) -> tuple[torch.Tensor, tuple[dict[int, Any]]]:
    """An input to trace with, and that its first dimension may have any length."""
    side = preprocessing.size
    return torch.zeros(2, 3, side, side), ({0: torch.export.Dim("batch")},)
