"""ONNX: the computation itself with its weights, for any runtime that reads it."""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, first_sentence
from trainer.export.target import Features, Target, Tensors, absent
from trainer.export.to_torch_export import INPUT, example

_OUTPUT = "features"


class ToOnnx(Target):
    """One ``.onnx`` file: ``images`` (batch, 3, H, W) float32 to ``features`` (batch, F)."""

    name = "onnx"
    built_by = "onnxruntime"
    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    dtype = torch.float32
    # float32 in another order, and folded batch normalisation, against float64.
    tolerance = 2e-5

    def write(self, model: nn.Module, tensors: Tensors) -> dict[str, bytes]:
        """Exported by torch, with any number of images."""
        try:
            import onnx  # noqa: F401  (torch's exporter needs both)
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise absent(self.name, "onnx onnxscript onnxruntime", error) from None
        images, dimensions = example(self.preprocessing)
        # Its progress and notes are for its developers.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        try:
            with redirect_stdout(io.StringIO()):
                program = torch.onnx.export(
                    model,
                    (images,),
                    dynamo=True,
                    input_names=[INPUT],
                    output_names=[_OUTPUT],
                    dynamic_shapes=dimensions,
                    verbose=False,
                )
            assert program is not None  # noqa: S101  (dynamo=True gives one)
            content: bytes = program.model_proto.SerializeToString()  # fails above 2 GB
        except Exception as error:  # whatever a user's own module makes of it
            raise ConfigError(
                f"--format onnx: torch cannot export {self.encoder.name}:"
                f" {type(error).__name__}: {first_sentence(error)}"
            ) from error
        return {"": content}

    def load(self, written: Path | bytes) -> Features:
        """A session of onnxruntime on the CPU."""
        try:
            import onnxruntime
        except ImportError as error:
            raise absent(self.name, "onnxruntime", error) from None
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])

        def features(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run([_OUTPUT], {INPUT: images.numpy()})[0])

        return features

    def facts(self) -> dict[str, Any]:
        """Names and shapes."""
        side = self.preprocessing.size
        return {
            "input": {"name": INPUT, "shape": ["batch", 3, side, side], "dtype": "float32"},
            "output": {"name": _OUTPUT},
        }

    def instructions(self, name: str) -> list[str]:
        """For features."""
        return [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({name!r})",
            f"features = session.run(None, {{{INPUT!r}: images}})[0]  "
            "# images: float32 NumPy array, see `preprocessing`",
        ]
