"""The files of a checkpoint: written through to disk with their checksum, and checked on reading.

Tensors go into safetensors files piece by piece: a header, then raw little-endian bytes. Nothing is
serialised in memory first, so that writing needs no second copy of the tensors.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from common import fault_injection
from common.errors import CheckpointError, DataError
from common.files.atomic_file import sync_folder
from common.files.strict_json import dump_json, read_json_file

Tensors = dict[str, torch.Tensor]

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
"""Of the manifest. 1 had no checksum of its own and named no tensors."""

_PIECE = 16 << 20  # bytes given to the checksum and the file at a time
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.(safetensors|json)")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write a safetensors file through to disk.

    Args:
        path: a file that does not exist yet.
        tensors: any device and layout; one at a time is made contiguous on the CPU.

    Returns:
        The file's entry in the manifest.

    Raises:
        OSError: names the file.
        TypeError: safetensors has no name for a tensor's dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{path.name}: {name} is {tensor.dtype}; a checkpoint cannot hold it")
    # Wide types first, as safetensors itself does: every tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = dump_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    facts = _write_through(path, chain([begin], (_bytes_of(tensors[name]) for name in names)))
    shapes = {name: f"{_DTYPES[tensors[name].dtype]}{header[name]['shape']}" for name in names}
    return {**facts, "tensors": shapes}


def write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write a JSON file through to disk; returns its entry in the manifest.

    Raises:
        OSError: names the file.
    """
    return _write_through(path, [_json_bytes(values)])


def write_manifest(path: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest of ``files`` with its own checksum, so that no bit of it can change.

    Raises:
        OSError: names the file.
    """
    content = {"format": FORMAT, "files": files}
    write_json(path, {**content, "sha256": _digest(content)})


def _write_through(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new private file through to disk; returns its entry in the manifest.

    Both the checksum and the file system let other threads run meanwhile.
    """
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with _naming(path), os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                fault_injection.at("checkpoint.write")
                written = file.write(view[:_PIECE])
                digest.update(view[:written])
                size += written
                view = view[written:]
        fault_injection.at("checkpoint.sync")
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: names the directory.
    """
    with _naming(path):
        fault_injection.at("checkpoint.sync")
        sync_folder(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or holds none.
    """
    try:
        return read_json_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except DataError as error:
        raise CheckpointError(str(error)) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """The entries of a manifest, by file name.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {values.get('format')!r}, not {FORMAT}")
    digest = values.pop("sha256", None)
    if digest != _digest(values):
        raise CheckpointError(f"{path}: its content does not match its checksum")
    files = values.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path}: lists no {STATE}")
    return files


def check_file(directory: Path, name: str, facts: Any) -> None:
    """Check a file against its entry in the manifest.

    Raises:
        CheckpointError: it is missing, cut or changed, or the entry is no entry; names the file.
    """
    path = directory / name
    if not _FILE_NAME.fullmatch(name) or not isinstance(facts, dict):
        raise CheckpointError(f"{directory / MANIFEST}: bad entry {name!r}")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing or not a plain file")
    try:
        size = path.stat().st_size
        if size != facts.get("bytes"):
            raise CheckpointError(f"{path}: {size} bytes, its manifest says {facts.get('bytes')}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None
    if digest != facts.get("sha256"):
        raise CheckpointError(f"{path}: its content does not match its checksum")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    """Without a last newline: a file that lost its last byte is no JSON."""
    return dump_json(values, indent=1, sort_keys=True).encode()


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json_bytes(values)).hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls on descriptors say what went wrong, but not with which file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
