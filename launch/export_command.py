"""``widebatch export``: an encoder's weights for another library, proven to be the same."""

import argparse
from pathlib import Path
from typing import Any

from launch.exit_codes import ExitCode
from trainer.errors import ConfigError

# Names and what they are, so that --help imports no torch; a test holds them to trainer.export.
FORMATS = {"torchvision": "keys of torchvision.models.NAME(), only the classifier's missing"}

_DESCRIPTION = """\
Write the encoder of a run as OUT.safetensors and a description as OUT.json: architecture,
preprocessing, origin, checksum, and the lines of Python that load it. Before it says done, the
written file is loaded into a model that the other library built, and features of real images are
compared. A failing comparison leaves no file.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``export`` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write an encoder for torchvision",
        description=_DESCRIPTION,
        usage="widebatch export RUN [--format FORMAT] (OUT.safetensors | --out OUT.safetensors) "
        "[--which {last,best}] [--force]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a pretraining run")
    # Not nargs="?": argparse would take it as absent before it sees a word that follows an option.
    out = parser.add_argument("out_file", type=Path, metavar="OUT", help="the file to write")
    out.required = False
    parser.add_argument("--out", type=Path, help="the same, as an option")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="torchvision",
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    parser.add_argument(
        "--which",
        choices=("last", "best"),
        default="last",
        help="the newest checkpoint, or the one with the best online kNN (default last)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export and say what was written and how it was proven."""
    named = {path for path in (args.out_file, args.out) if path is not None}
    if len(named) != 1:
        problem = "two different outputs are named" if named else "no output is named"
        raise ConfigError(f"{problem}: widebatch export RUN --out OUT.safetensors")
    from trainer.export import export

    done = export(args.source, named.pop(), args.format, args.which, args.force)
    facts, proof = done.facts, done.proof
    print(
        f"encoder   {args.source}, step {facts['step']}: {facts['architecture']}, "
        f"{facts['feature_dim']} features"
    )
    print(f"weights   {done.weights} ({done.tensors} tensors, {done.num_bytes / 1e6:.1f} MB)")
    print(f"about it  {done.description}: preprocessing, origin, how to load")
    print(
        f"proof     features of {proof.images} images ({proof.image_source}) in a model that "
        f"{args.format} built: largest difference {proof.relative_difference:.1e} of the largest "
        f"feature, {proof.tolerance:.0e} allowed"
    )
    return ExitCode.DONE
