"""The manifest beside a .beton: what was packed, how, and what became of every image.

``photos.beton.json`` is plain JSON. It names the SHA-256 of the file and of its contents; the file
carries the latter too, so a manifest beside the wrong file is found out at once.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files.strict_json import dump_json, read_json_file

FORMAT = "widebatch-manifest"
VERSION = 1
_MAX_BYTES = 1 << 30
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ManifestHead:
    """The part of a manifest that identifies a file."""

    path: Path
    num_samples: int
    num_bytes: int
    sha256: str  # of the whole file
    content: str  # SHA-256 over images and labels, as the file says it too
    class_names: tuple[str, ...]
    target_names: tuple[str, ...]


def manifest_path(beton: Path) -> Path:
    """``photos.beton`` -> ``photos.beton.json``."""
    return beton.with_name(beton.name + ".json")


def dump_manifest(fields: dict[str, Any]) -> bytes:
    """A manifest's bytes; ASCII, so that file names in any encoding survive."""
    head = {"format": FORMAT, "version": VERSION}
    return dump_json(head | fields, indent=1).encode() + b"\n"


def load_manifest(beton: Path) -> dict[str, Any] | None:
    """The whole manifest beside a .beton, as JSON gives it; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = manifest_path(beton)
    try:
        fields = read_json_file(path, _MAX_BYTES)
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path}: a link to nowhere; delete it") from None
        return None
    if fields.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of 'widebatch pack'; move it away")
    if fields.get("version") != VERSION:
        raise DataError(f"{path}: of another version of widebatch; pack again")
    return fields


def read_manifest(beton: Path) -> ManifestHead | None:
    """The identity that the manifest beside a .beton states; None where there is none.

    Raises:
        DataError: it cannot be read, or lacks what a manifest has.
    """
    fields = load_manifest(beton)
    if fields is None:
        return None
    path = manifest_path(beton)
    count, size = fields.get("count"), fields.get("bytes")
    digests = fields.get("sha256"), fields.get("content_sha256")
    if type(count) is not int or type(size) is not int:
        raise DataError(f"{path}: 'count' and 'bytes' must be integers; pack again")
    if not all(isinstance(digest, str) and _HEX_DIGEST.fullmatch(digest) for digest in digests):
        raise DataError(f"{path}: 'sha256' and 'content_sha256' must be SHA-256; pack again")
    sha256, content = map(str, digests)
    names = (_names(path, key, fields.get(key, [])) for key in ("classes", "targets"))
    return ManifestHead(path, count, size, sha256, content, *names)


def _names(path: Path, key: str, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: '{key}' must be a list of names; pack again")
    return tuple(names)
