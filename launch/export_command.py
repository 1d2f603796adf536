"""``widebatch export``: an encoder for another library, proven to be the same."""

import argparse
from pathlib import Path
from typing import Any

from launch.exit_codes import ExitCode

# Names and what they are, so that --help imports no torch; a test holds them to trainer.export.
FORMATS = {
    "torchvision": "OUT.safetensors for torchvision.models.NAME(), all but the classifier",
    "timm": "OUT.safetensors for timm.create_model(NAME, num_classes=0): ResNets, ViTs",
    "huggingface": "a folder for transformers' ResNetModel or ViTModel.from_pretrained",
    "detectron2": "OUT.safetensors with the names of detectron2's ResNet backbone",
    "onnx": "OUT.onnx for onnxruntime and others, any number of images",
    "torch-export": "OUT.pt2 for torch.export.load, any number of images",
}

_DESCRIPTION = """\
Write the encoder of a run for another library, with a description in JSON (architecture,
preprocessing, origin, checksum, the lines of Python that load it) and a model card in Markdown.
Before it says done, the library itself has loaded what was written, and its features of real
images were compared with the run's. A failing comparison leaves no file. detectron2 is on no
package index: there a stand-in with its names is compared.

formats:
{formats}

OUT.json and OUT.md stand beside OUT.safetensors, OUT.onnx and OUT.pt2; the folder of huggingface
has widebatch.json and README.md in it. A library that is not installed is named with the command
that installs it.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``export`` to the command line."""
    formats = "\n".join(f"  {name:<12}  {what}" for name, what in FORMATS.items())
    parser = subparsers.add_parser(
        "export",
        help="write an encoder for torchvision, timm, Hugging Face, detectron2, ONNX, torch.export",
        description=_DESCRIPTION.format(formats=formats),
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a pretraining run")
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="torchvision",
        help="see above (default torchvision)",
    )
    parser.add_argument(
        "--which",
        choices=("last", "best"),
        default="last",
        help="the newest checkpoint, or the one with the best online kNN (default last)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the encoder's moving average instead, which BYOL, DINO and MoCo keep",
    )
    parser.add_argument(
        "--card", type=Path, metavar="CARD.md", help="where the model card goes (default OUT.md)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace existing files, or a folder of an export"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and say what was written and how it was proven."""
    from trainer.export import export

    done = export(args.source, args.out, args.format, args.which, args.force, args.card, args.ema)
    facts, proof = done.facts, done.proof
    print(
        f"encoder   {args.source}, step {facts['step']}: {facts['architecture']}, "
        f"{facts['feature_dim']} features"
    )
    print(f"weights   {done.weights} ({done.tensors} tensors, {done.num_bytes / 1e6:.1f} MB)")
    print(f"about it  {done.description}: preprocessing, origin, how to load")
    print(f"card      {done.card}")
    print(
        f"proof     features of {proof.images} images ({proof.image_source}) by "
        f"{proof.computed_by}: largest difference {proof.relative_difference:.1e} of the largest "
        f"feature, {proof.tolerance:.0e} allowed"
    )
    return ExitCode.DONE
