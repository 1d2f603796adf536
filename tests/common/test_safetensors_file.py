"""A safetensors file whose bytes do not each belong to its header or one tensor is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from common.errors import DataError
from common.files.safetensors_file import load_safetensors, parse_safetensors

pytestmark = pytest.mark.reliability(30)

PATH = Path("some/x.safetensors")


def assembled(header: Any, size: int = 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + bytes(size)


def entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
    elements = (last - first) // 4
    return {"dtype": "F32", "shape": [elements], "data_offsets": [first, last], **changes}


SOUND = {"a": entry(0, 8), "b": entry(8, 24)}

HOSTILE = {
    "nothing": (b"", "header too small"),
    "header past the end": (assembled(SOUND, length=1 << 62), "header too large"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "header too large"),
    "header of blanks": (assembled(b" " * (16 << 20)), "invalid JSON in header"),
    "overlap": (assembled({"a": entry(0, 12), "b": entry(8, 24)}), "invalid offset"),
    "the same bytes": (assembled({"a": entry(0, 24), "b": entry(0, 24)}), "invalid offset"),
    "gap": (assembled({"a": entry(0, 8), "b": entry(12, 24)}), "invalid offset"),
    "bytes before": (assembled({"a": entry(4, 24)}), "invalid offset"),
    "bytes after": (assembled({"a": entry(0, 20)}), "not fully covered"),
    "past the end": (assembled({"a": entry(0, 28)}), "not fully covered"),
    "wider type": (assembled({"a": entry(0, 24, dtype="F64")}), "invalid shape"),
    "unknown type": (assembled({"a": entry(0, 24, dtype="F128")}), "unknown variant"),
    "no type": (assembled({"a": entry(0, 24, dtype=[])}), "invalid type"),
    "wrong shape": (assembled({"a": entry(0, 24, shape=[7])}), "invalid shape"),
    "shape that wraps": (assembled({"a": entry(0, 24, shape=[1 << 62, 1 << 62, 6])}), "overflow"),
    "beyond torch": (assembled({"a": entry(0, 0, shape=[0, 1 << 63])}, 0), "Overflow"),
    "negative shape": (assembled({"a": entry(0, 24, shape=[-6, -1])}), "expected usize"),
    "true for 1": (assembled({"a": entry(0, 24, shape=[6, True])}), "expected usize"),
    "one offset": (assembled({"a": entry(0, 24, data_offsets=[24])}), "invalid length"),
    "backwards": (assembled({"a": entry(0, 24, data_offsets=[24, 0])}), "invalid offset"),
    "no entry": (assembled({"a": 1}), "expected struct"),
    "a name twice": (
        assembled(b'{"a":' + json.dumps(entry(0, 24)).encode() + b',"a":1}'),
        "expected struct",
    ),
    "deep": (assembled(b'{"a":' * 100_000), "recursion limit"),
    "metadata": (assembled({"__metadata__": {"a": 1}, "a": entry(0, 24)}), "expected a string"),
    "a list": (assembled([]), "expected struct"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "header"),
    "a zip": (b"PK\x03\x04" + bytes(200), "header"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    data, message = HOSTILE[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as from_memory:
        parse_safetensors(data, path)
    with pytest.raises(DataError) as from_file:
        load_safetensors(path)
    for said in map(str, (from_memory.value, from_file.value)):
        assert said.startswith(f"{path}: no valid safetensors file (")
        assert "\n" not in said


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(3, 4),
        "half": torch.ones(5).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }
    data = save(tensors, {"made": "by a test"})
    (tmp_path / "x.safetensors").write_bytes(data)
    for loaded in (parse_safetensors(data, PATH), load_safetensors(tmp_path / "x.safetensors")):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            load_safetensors(path)
