"""safetensors files, proved sound before any tensor is made of them.

The safetensors library checks a header too. This check stands before it, is stricter, and can be
read on one screen: every byte of the file belongs to the header or to exactly one tensor, sizes
follow from shapes, no name stands twice. Layout::

    length of the header, 8 bytes little-endian | header, JSON | the tensors' bytes
"""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from common.errors import DataError
from common.files.regular_file import open_regular
from common.files.strict_json import parse_json

Tensors = dict[str, torch.Tensor]

MAX_HEADER = 16 << 20  # bytes: 100,000 tensors
_MAX_DIMENSIONS = 16
_LENGTH = 8  # bytes
_WIDTHS = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
"""Bytes of an element, by the format's names of types."""


def load_safetensors(path: Path) -> Tensors:
    """Tensors of a file, on the CPU; they map it, so it must not be changed while they live.

    Raises:
        DataError: it is missing, no regular file, or not a sound safetensors file; names it.
    """
    try:
        with open_regular(path) as file:
            _check(_read_header(file), os.fstat(file.fileno()).st_size)
        loaded: Tensors = safetensors.torch.load_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _refusal(path, error) from None
    return loaded


def parse_safetensors(data: bytes, path: Path) -> Tensors:
    """Tensors of a file's content.

    Args:
        data: all of it.
        path: of the file, for messages.

    Raises:
        DataError: it is not a sound safetensors file; names it.
    """
    length = int.from_bytes(data[:_LENGTH], "little")
    header = data[: _LENGTH + min(length, MAX_HEADER)]
    try:
        _check(header, len(data))
        loaded: Tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _refusal(path, error) from None
    return loaded


def _refusal(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"{path}: no valid safetensors file ({error}); restore it or export it again")


def _read_header(file: BinaryIO) -> bytes:
    start = file.read(_LENGTH)
    return start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER))


def _check(start: bytes, size: int) -> None:
    """Prove a header (with the length before it) against its file of ``size`` bytes.

    Raises:
        ValueError: says what is wrong.
    """
    length = int.from_bytes(start[:_LENGTH], "little")
    if len(start) < _LENGTH or length > size - _LENGTH:
        raise ValueError("ends inside its header")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = parse_json(start[_LENGTH:])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its metadata are not texts")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            raise ValueError(f"{name!r} starts at {first}, the tensor before it ends at {end}")
        end = last
    if end != size - _LENGTH - length:
        raise ValueError(f"tensors of {end} bytes in {size - _LENGTH - length} bytes")


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes start and end, from its entry in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} has other keys than a tensor's")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise ValueError(f"{name!r} has the unknown type {dtype!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has an impossible shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has impossible offsets")
    first, last = offsets
    if last - first != math.prod(shape) * _WIDTHS[dtype]:
        raise ValueError(f"{name!r} has {last - first} bytes for {dtype} {shape}")
    return first, last, name


def _are_counts(values: Any) -> bool:
    """Whether it is a list of integers from 0."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
