"""JSON in files: what others may have written is read strictly, and so is written what others read.

Python's own reader takes the last of two equal keys, NaN and Infinity, integers of any length and
nesting up to its own stack's depth. Each of these makes a file mean one thing to us and another to
the next program, or costs time and memory out of proportion.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files.regular_file import open_regular

MAX_BYTES = 64 << 20  # of a file, unless its reader allows more
MAX_DEPTH = 64  # of nesting
_MAX_DIGITS = 20  # of an integer: 64 bits


def dump_json(value: Any, **options: Any) -> str:
    """JSON text that any program reads: what is not finite, which JSON has no word for, is null.

    Args:
        value: plain values.
        options: of :func:`json.dumps`.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is no JSON, has a key twice in one object, a number that is not finite or
            does not fit 64 bits, or nests deeper than :data:`MAX_DEPTH`.
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    return value


def read_json_file(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that a file holds, see :func:`parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no regular file, larger than ``max_bytes``, or holds no JSON object; names
            the file.
    """
    try:
        with open_regular(path) as file:
            # Asked for more, Python allocates all of it first.
            text = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(text) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes} bytes; it is not ours")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); restore it or delete it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no JSON object; restore it or delete it")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {_short(key)} stands twice in one object")
            seen.add(key)
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {_short(text)} does not fit 64 bits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is not finite")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _check_depth(value: Any) -> None:
    """Level by level: no recursion, whatever the nesting."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = inner
