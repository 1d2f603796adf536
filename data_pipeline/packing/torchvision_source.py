"""torchvision's data sets by name, downloaded only when asked.

Sets that take a ``loader`` (most that consist of files) are asked for paths instead of pixels, so
their files are packed as they are and by all cores; the others hand out decoded images.
"""

import difflib
import inspect
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image, ImageFile

from common.errors import DataError
from data_pipeline.packing.image_codec import NO_LABEL, LeftOut, Sample

_NO_DATA_SETS = frozenset(
    {"VisionDataset", "ImageFolder", "DatasetFolder", "wrap_dataset_for_transforms_v2"}
)


def _plain(name: str) -> str:
    """``Fashion-MNIST`` and ``fashion_mnist`` are ``fashionmnist``."""
    return name.lower().replace("-", "").replace("_", "")


_CLASSES = {
    _plain(name): getattr(torchvision.datasets, name)
    for name in torchvision.datasets.__all__
    if name not in _NO_DATA_SETS
}


def is_known(name: str) -> bool:
    """Whether ``NAME`` of ``NAME[:SPLIT]`` is a torchvision data set."""
    return _plain(name.partition(":")[0]) in _CLASSES


def similar(name: str) -> str:
    """``"; did you mean A or B?"``, or nothing where no data set has a name like this one."""
    near = difflib.get_close_matches(_plain(name), sorted(_CLASSES), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def open_torchvision(name: str, *, root: Path, download: bool) -> "TorchvisionSource":
    """The data set ``NAME[:SPLIT]``, such as ``CIFAR10:test`` or ``EMNIST:letters:test``.

    The split is the set's own default where none is given, ``root`` what torchvision calls so.

    Raises:
        DataError: no such set or split; the data is not there; it is no image classification set.
    """
    base, *parts = name.split(":")
    if not is_known(base):
        raise DataError(
            f"torchvision:{name}: torchvision has no data set of this name{similar(base)}"
        )
    cls = _CLASSES[_plain(base)]
    parameters = _constructor_parameters(cls)
    arguments: dict[str, Any] = _split_arguments(name, parameters, parts)
    if "root" in parameters:
        arguments["root"] = str(root)
    if "download" in parameters:
        arguments["download"] = download
    if "loader" in parameters:
        arguments["loader"] = str  # a path as it is: its file is ours to read
    return TorchvisionSource(_construct(name, cls, arguments, root), name, root)


def _constructor_parameters(cls: type) -> frozenset[str]:
    """Names that the constructor takes, also by way of ``**kwargs`` to those it inherits from."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        signature = inspect.signature(vars(base)["__init__"])
        names.update(signature.parameters)
        if "kwargs" not in signature.parameters:
            break
    return frozenset(names)


def _split_arguments(name: str, parameters: frozenset[str], parts: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    remaining = list(parts)
    if remaining and "split" in parameters:
        arguments["split"] = remaining.pop(0)
    if remaining and "train" in parameters:
        word = remaining.pop(0)
        if word not in ("train", "test"):
            raise DataError(f"torchvision:{name}: its splits are train and test, not {word!r}")
        arguments["train"] = word == "train"
    if remaining:
        raise DataError(f"torchvision:{name}: there is no split {remaining[0]!r}")
    return arguments


def _construct(name: str, cls: type, arguments: dict[str, Any], root: Path) -> Any:
    try:
        return cls(**arguments)
    except Exception as error:
        # Each set has its own way to say what is wrong: RuntimeError, ValueError, OSError, a
        # missing package...; the message is theirs, the remedy ours.
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError | TypeError):  # an unknown split, an argument it needs
            raise DataError(f"torchvision:{name}: {said}") from error
        where = f"under {root.absolute()}"
        if isinstance(error, ImportError):
            remedy = "install the package it names"
        elif arguments.get("download"):
            remedy = "the download failed: try again, or fetch it by hand"
        elif "download" in arguments:
            remedy = "--download fetches it, --root DIR looks elsewhere"
        else:
            remedy = "torchvision cannot download this set: fetch it by hand; --root DIR says where"
        raise DataError(f"torchvision:{name}: not usable {where}: {said} ({remedy})") from error


class TorchvisionSource:
    """The samples of a torchvision data set in its own order."""

    def __init__(self, dataset: Any, name: str, root: Path) -> None:
        self._dataset, self._name, self._root = dataset, name, root
        self.passed_over: dict[str, list[str]] = {}
        self.starts: Sequence[int] = ()
        self.description = {"kind": "torchvision", "name": name, "root": str(root.absolute())}
        self.class_names = _class_names(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """The file's path below the root, where the set consists of files; else its number."""
        image = self.sample(index).image
        return os.path.relpath(image, self._root) if isinstance(image, str) else f"#{index}"

    def sample(self, index: int) -> Sample:
        """A path or pixels, and the label."""
        try:
            image, target = self._dataset[index]
        except Exception as error:  # a broken file inside the set raises whatever its reader does
            return Sample(LeftOut(f"cannot be read: {type(error).__name__}: {error}"), NO_LABEL)
        label = self._label(target)
        if isinstance(image, str | Path):
            return Sample(str(image), label)
        if not isinstance(image, Image.Image):
            raise DataError(f"torchvision:{self._name}: gives {type(image).__name__}, no images")
        if isinstance(image, ImageFile.ImageFile) and image.filename:  # opened, and nothing else
            return Sample(os.fsdecode(image.filename), label)
        if image.mode not in ("L", "RGB"):
            return Sample(LeftOut(f"pixels of mode {image.mode}: pack the set's files"), label)
        try:
            pixels = np.asarray(image)
        except Exception as error:  # opened lazily: decoding fails only here
            return Sample(LeftOut(f"cannot be decoded: {type(error).__name__}: {error}"), label)
        return Sample(pixels, label)

    def _label(self, target: Any) -> int:
        if target is None:
            return NO_LABEL
        try:
            return operator.index(target)
        except TypeError:
            raise DataError(
                f"torchvision:{self._name}: its targets are {type(target).__name__}, not classes; "
                "pack its folder of images instead"
            ) from None


def _class_names(dataset: Any) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple):
        return ()
    # ImageNet's classes are tuples of synonyms.
    return tuple(", ".join(c) if isinstance(c, tuple) else str(c) for c in classes)
