"""ONNX and torch.export: the computation itself with its weights, for runtimes without its code.

The ``.pt2`` archive is torch's own format. torch reads the example inputs in it by its restricted
unpickler; nothing of ours does.
"""

import abc
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, first_sentence
from trainer.export.target import Features, Target, Tensors

_INPUT, _OUTPUT = "images", "features"
_ANY_NUMBER = ({0: torch.export.Dim("batch")},)  # of images, the one input


class _Program(Target):
    """One file: (batch, 3, H, W) float32 to (batch, F), in evaluation mode."""

    dtype = torch.float32
    # float32 in another order, and folded batch normalisation, against float64.
    tolerance = 2e-5

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """Traced with any number of images."""
        side = self.preprocessing.size
        try:
            return {"": self.traced(model, torch.zeros(2, 3, side, side))}
        except Exception as error:  # whatever a user's own module makes of it
            raise ConfigError(
                f"--format {self.name}: torch cannot export {self.encoder.name}:"
                f" {type(error).__name__}: {first_sentence(error)}"
            ) from error

    @abc.abstractmethod
    def traced(self, model: nn.Module, images: torch.Tensor) -> bytes:
        """The file's content, traced with ``images``."""

    def facts(self) -> dict[str, Any]:
        """Shapes."""
        side = self.preprocessing.size
        return {"input": {"shape": ["batch", 3, side, side], "dtype": "float32"}}


class ToTorchExport(_Program):
    """One ``.pt2`` file."""

    name = "torch-export"
    built_by = "the program that torch.export.load gave"
    suffix = ".pt2"

    def traced(self, model: nn.Module, images: torch.Tensor) -> bytes:
        """By torch.export."""
        program = torch.export.export(model, (images,), dynamic_shapes=_ANY_NUMBER)
        archive = io.BytesIO()
        torch.export.save(program, archive)
        return archive.getvalue()

    def load(self, written: Path | bytes) -> Features:
        """What ``torch.export.load`` gives."""
        assert isinstance(written, bytes)  # noqa: S101  (a file's target)
        program: Features = torch.export.load(io.BytesIO(written)).module()
        return program

    def instructions(self, name: str) -> list[str]:
        """For features."""
        return [
            "import torch",
            "",
            f"model = torch.export.load({name!r}).module()",
            "features = model(images)  # float32, see `preprocessing`",
        ]


class ToOnnx(_Program):
    """One ``.onnx`` file."""

    name = "onnx"
    built_by = "onnxruntime"
    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """As any program, if torch's exporter has what it needs."""
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise self.absent("onnx onnxscript onnxruntime", error) from None
        return super().write(model, tensors)

    def traced(self, model: nn.Module, images: torch.Tensor) -> bytes:
        """By torch.onnx; its progress and notes are for its developers."""
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes=_ANY_NUMBER,
                verbose=False,
            )
        assert program is not None  # noqa: S101  (dynamo=True gives one)
        content: bytes = program.model_proto.SerializeToString()  # fails above 2 GB
        return content

    def load(self, written: Path | bytes) -> Features:
        """A session of onnxruntime on the CPU."""
        try:
            import onnxruntime
        except ImportError as error:
            raise self.absent("onnxruntime", error) from None
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])

    def facts(self) -> dict[str, Any]:
        """Names too."""
        return {
            "input": {"name": _INPUT, **super().facts()["input"]},
            "output": {"name": _OUTPUT},
        }

    def instructions(self, name: str) -> list[str]:
        """For features."""
        return [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({name!r})",
            f"features = session.run(None, {{{_INPUT!r}: images}})[0]  "
            "# images: float32 NumPy array, see `preprocessing`",
        ]
