"""``widebatch pack SRC OUT.beton``: images into the file that training reads."""

import argparse
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from launch.exit_codes import ExitCode
from launch.surroundings import printable

if TYPE_CHECKING:
    from data_pipeline.packing.pack import PackReport

_DESCRIPTION = """\
Pack images into a .beton file and write a manifest, OUT.beton.json, beside it.

SRC is one of
  a folder            one sub-folder per class (as torchvision's ImageFolder numbers them), or flat
  FILE.tar            or a folder of them, WebDataset's too: classes are the numbers in .cls, or
                      else folders as above
  torchvision:NAME    or just NAME where no folder is called so: cifar10, CIFAR100:test,
                      stl10:unlabeled, fashion-mnist, food101, ...; fetched only with --download
  embedded:NAME       images that ship with widebatch: embedded:digits:train, embedded:digits:test,
                      and clips of them: embedded:moving-digits:train, embedded:moving-digits:test
"""
_EPILOG = """\
JPEG files that need no change are stored as they are, grey ones too. Others: larger than
--max-side: shrunk; turned by EXIF, XMP or TIFF: turned upright; grey (but for JPEG), palette, CMYK,
16-bit: 8-bit RGB; transparent: on white; animated, several pages: the first. The manifest says what
each lost. Left out, counted, and listed in the manifest is what cannot be used: damaged, truncated,
empty, no image, more than --max-pixels, fewer than --min-levels, signed, 32-bit or floating-point
pixels, bands that are neither grey nor RGB. --strict refuses instead.
The same images and settings give the same bytes, whatever the number of workers.
"""
_SHOWN = 5  # images left out that are named on the terminal; the manifest lists all


def add_parser(subparsers: Any) -> None:
    """Add ``pack`` to the command line."""
    parser = subparsers.add_parser(
        "pack",
        help="pack images into a .beton file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,  # those of PackConfig
    )
    parser.add_argument("source", metavar="SRC", help="folder or name, see above")
    parser.add_argument("out", metavar="OUT.beton", type=Path, help="file to write or replace")
    add = parser.add_argument
    add("--max-side", type=int, metavar="PX", help="shrink longer sides to this; 0: no")
    add("--quality", type=int, metavar="Q", help="JPEG quality, 1 to 100 (90)")
    add(
        "--format",
        choices=("auto", "jpeg", "raw"),
        help="auto: JPEG files as they are, others up to 128 x 128 pixels raw (lossless), larger "
        "ones as JPEG; jpeg, raw: all so (raw reads faster and takes about ten times the space)",
    )
    add(
        "--clips",
        action="store_true",
        help="images are frames of clips, for frame order: each folder of them is one, and so is"
        " each video; folders at the top are classes where clips lie in them",
    )
    add("--workers", type=int, metavar="N", help="processes; 0: one for each core it may use")
    add(
        "--shard",
        metavar="K/N",
        help="pack the K-th of N shares, on as many processes or machines as there are; the files"
        " together are one set, in their order. What is packed stays when another is killed",
    )
    add(
        "--no-labels",
        dest="labels",
        action="store_false",
        help="all images below SRC, without labels",
    )
    add(
        "--targets",
        type=Path,
        metavar="TABLE.csv",
        help="what to predict of images beside their class, for 'evaluate targets': a head of"
        " names, then a row for each image: its path below SRC, and a number for each name (0 or 1"
        " for labels of which an image has several; empty: unknown)",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse at the first image that cannot be used, and files that are passed over",
    )
    add("--keep-damaged", action="store_true", help="keep what is left of bad JPEGs and PNGs")
    add(
        "--as-stored",
        dest="upright",
        action="store_false",
        help="do not turn images by the orientation they state",
    )
    add(
        "--min-levels",
        type=int,
        metavar="N",
        help="leave out images of more than 8 bits that would keep fewer levels, such as 12-bit "
        "pixels in 16-bit files; 0: none (64)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="leave images out unread of which more pixels would have to be held (67108864: 64 "
        "megapixels; eight bytes each); JPEGs that --max-side shrinks are decoded scaled",
    )
    add(
        "--extensions",
        metavar="E,E",
        help="more file names that are images, as .gif,.jp2 (beside ImageFolder's: .jpg, ...)",
    )
    add("--download", action="store_true", help="fetch a torchvision data set that is missing")
    add("--root", type=Path, metavar="DIR", help="where they lie (data)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pack, say what became of the images, and return the exit status."""
    from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS
    from data_pipeline.packing.pack import PackConfig, pack

    names = {field.name for field in fields(PackConfig)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    if "extensions" in args:
        more = (extension.strip().lower() for extension in args.extensions.split(","))
        settings["extensions"] = tuple(dict.fromkeys([*IMAGE_EXTENSIONS, *filter(None, more)]))
    config = PackConfig(**settings)
    # A scheduler's SIGTERM cleans up as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        report = pack(args.source, args.out, config)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for line in _lines(report):
        print(printable(line))
    return int(ExitCode.DONE)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _lines(report: "PackReport") -> Iterator[str]:
    classes = f", {len(report.class_names)} classes" if report.class_names else ""
    if report.num_labelled and (not classes or report.num_labelled < report.num_samples):
        classes += f", {report.num_labelled} of them labelled"
    rate = report.num_samples / max(report.seconds, 1e-9)
    yield (
        f"{report.path}: {report.num_samples} images{classes}, {report.num_bytes / 1e6:.1f} MB, "
        f"in {report.seconds:.1f} s ({rate:.0f} images/s)"
    )
    for what, count in (report.fates | report.changes).items():
        yield f"  {count:>9} {what}"
    for why, count in report.passed_over.items():
        yield f"  {count:>9} files passed over: {why}"
    if report.left_out:
        yield f"  {len(report.left_out):>9} images LEFT OUT, all listed in {report.path}.json:"
        for name, reason in report.left_out[:_SHOWN]:
            yield f"            {name}: {reason}"
    if report.empty_classes:
        names = ", ".join(report.empty_classes[:_SHOWN])
        yield f"  {len(report.empty_classes):>9} classes without a usable image: {names}"
    yield f"  sha256 {report.fingerprint}"
