"""Stock FFCV 1.0.2, made fit for use inside a training process. All contact with its flaws is here.

What is used of FFCV: its file format, the calling convention of its decoders, and its binary, which
links libjpeg-turbo. What is not: its ``Loader``. The threads of that hang for ever
when a stage raises, leak 36 MB at every ``break``, overwrite batches that the consumer still holds,
need Numba's process-wide thread pool and compile for seconds in every process.
``data_pipeline.reading.loader`` drives a stage that is compiled once per installation, from a plain
thread pool.

Mended here:

* importing FFCV takes 4 s, all of it to compile a dictionary of two entries, sets torch's number of
  threads to 1 for the whole process and starts Numba's threads;
* its memory manager builds Python sets for every sample, 1.3 GB for ImageNet, and maps the file:
  :mod:`data_pipeline.reading.open_beton` serves instead;
* a missing library is reported as what it is.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numba
import torch
from llvmlite import binding as llvm  # type: ignore[import-untyped]
from numba import types

from common.errors import DataError
from data_pipeline.reading.jpeg import turbo_library, turbo_problem

_REMEDY = "install it, or read with --loader.backend torchvision"

# C functions of the libjpeg-turbo that FFCV's binary links. Pointers and TurboJPEG's handles travel
# as 64-bit integers.
_POINTER, _INT = types.int64, types.int32
SIGNATURES = {
    # Handle, JPEG, size, *width, *height, *subsampling, *colour space.
    "tjInitDecompress": _POINTER(),
    "tjDestroy": _INT(_POINTER),
    "tjDecompressHeader3": _INT(_POINTER, _POINTER, types.uint64, *[_POINTER] * 4),
    # Handle, JPEG, size, **planes, width, *strides, height, flags.
    "tjDecompressToYUVPlanes": _INT(
        _POINTER, _POINTER, types.uint64, _POINTER, _INT, _POINTER, _INT, _INT
    ),
    "tjPlaneWidth": _INT(_INT, _INT, _INT),  # component, width, subsampling
    "tjPlaneHeight": _INT(_INT, _INT, _INT),
    # Handle, JPEG, size, pixels, width, bytes of a row, height, format, flags.
    "tjDecompress2": _INT(_POINTER, _POINTER, types.uint64, _POINTER, *[_INT] * 5),
    # The C library's: descriptor, *target, bytes, offset.
    "pread": types.int64(_INT, _POINTER, types.uint64, types.int64),
}
_PREFIX = "widebatch_"  # own names, so that no other library's symbol can stand in


def external(name: str) -> Any:
    """A C function of :data:`SIGNATURES` for compiled code; :func:`bind_symbols` must come first.

    By name rather than by address, so that Numba can keep the compiled code on disk.
    """
    return types.ExternalFunction(_PREFIX + name, SIGNATURES[name])


@cache
def bind_symbols() -> None:
    """Tell the linker of compiled code where FFCV's functions are.

    They are looked up through FFCV's binary, never by the file name of a library, so they are
    always those that FFCV itself uses.

    Raises:
        DataError: FFCV or a library that it links cannot be loaded.
    """
    library = ctypes.CDLL(import_ffcv()._libffcv.__file__)
    for name in SIGNATURES:
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise DataError(f"FFCV's binary has no {name}: unsupported build; {_REMEDY}") from error
        address = ctypes.cast(function, ctypes.c_void_p).value
        llvm.add_symbol(_PREFIX + name, address)


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """While FFCV is imported: a plain dictionary for its two modes, no thread pools."""
    from numba import typed

    kept = (typed.Dict, numba.set_num_threads, torch.set_num_threads)
    typed.Dict = dict
    numba.set_num_threads = torch.set_num_threads = lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        typed.Dict, numba.set_num_threads, torch.set_num_threads = kept


@cache
def import_ffcv() -> Any:
    """The package ``ffcv``, imported without its side effects.

    Raises:
        DataError: it or a library that it links cannot be loaded.
    """
    try:
        with _without_side_effects():
            import ffcv.fields.rgb_image
    except (ImportError, OSError) as error:
        # OSError: its binary is there, but libturbojpeg, OpenCV or oneTBB is not.
        raise DataError(f"FFCV cannot be used here ({error}); {_REMEDY}") from error
    return ffcv


def ffcv_problem() -> str | None:
    """Why FFCV cannot be used here, or None."""
    try:
        bind_symbols()
    except DataError as error:
        return str(error)
    return None


def jpeg_problem(data: bytes, height: int, width: int) -> str:
    """Why a JPEG, listed with these dimensions, did not decode; for error messages."""
    library = turbo_library(import_ffcv()._libffcv.__file__)
    return turbo_problem(library, data, height, width) or "unsupported colours"
