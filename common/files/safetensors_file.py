"""safetensors files. The library proves a header before it makes tensors of it.

Every byte of the file belongs to the header or to exactly one tensor, and sizes follow from shapes.
"""

import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from common.errors import DataError, first_sentence
from common.files.regular_file import open_regular

Tensors = dict[str, torch.Tensor]

# The library's own, and what it and torch raise at types and sizes that torch does not have.
_UNSOUND = (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, ValueError)


def load_safetensors(path: Path) -> Tensors:
    """Tensors of a file, on the CPU; they map it, so it must not be changed while they live.

    Raises:
        DataError: it is missing, no regular file, or not a sound safetensors file; names it.
    """
    try:
        open_regular(path).close()
        loaded: Tensors = safetensors.torch.load_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _UNSOUND as error:
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
    try:
        loaded: Tensors = safetensors.torch.load(data)
    except _UNSOUND as error:
        raise _refusal(path, error) from None
    return loaded


def _refusal(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    why = re.sub("^Error while deserializing( header)?: ", "", first_sentence(error))
    return DataError(f"{path}: no valid safetensors file ({why}); restore it or export it again")
