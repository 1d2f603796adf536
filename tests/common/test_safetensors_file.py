"""Every byte of a safetensors file belongs to its header or to one tensor, or it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from common.errors import DataError
from common.files.safetensors_file import MAX_HEADER, load_safetensors, parse_safetensors

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
    "nothing": (b"", "ends inside its header"),
    "header past the end": (assembled(SOUND, length=1 << 62), "ends inside its header"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "ends inside its header"),
    "header too large": (assembled(b" " * (MAX_HEADER + 1)), "a header of 16777217 bytes"),
    "overlap": (assembled({"a": entry(0, 12), "b": entry(8, 24)}), "starts at 8"),
    "the same bytes": (assembled({"a": entry(0, 24), "b": entry(0, 24)}), "starts at 0"),
    "gap": (assembled({"a": entry(0, 8), "b": entry(12, 24)}), "starts at 12"),
    "bytes before": (assembled({"a": entry(4, 24)}), "starts at 4"),
    "bytes after": (assembled({"a": entry(0, 20)}), "tensors of 20 bytes in 24"),
    "past the end": (assembled({"a": entry(0, 28)}), "tensors of 28 bytes in 24"),
    "wider type": (assembled({"a": entry(0, 24, dtype="F64")}), "24 bytes for F64"),
    "unknown type": (assembled({"a": entry(0, 24, dtype="F128")}), "unknown type"),
    "no type": (assembled({"a": entry(0, 24, dtype=[])}), "unknown type"),
    "wrong shape": (assembled({"a": entry(0, 24, shape=[7])}), "24 bytes for F32"),
    "shape that wraps": (assembled({"a": entry(0, 24, shape=[1 << 62, 1 << 62, 6])}), "bytes for"),
    "negative shape": (assembled({"a": entry(0, 24, shape=[-6, -1])}), "impossible shape"),
    "many dimensions": (assembled({"a": entry(0, 24, shape=[6, *[1] * 99])}), "impossible shape"),
    "true for 1": (assembled({"a": entry(0, 24, shape=[6, True])}), "impossible shape"),
    "one offset": (assembled({"a": entry(0, 24, data_offsets=[24])}), "impossible offsets"),
    "backwards": (assembled({"a": entry(0, 24, data_offsets=[24, 0])}), "-24 bytes for"),
    "other keys": (assembled({"a": entry(0, 24, path="/etc/passwd")}), "other keys"),
    "no entry": (assembled({"a": 1}), "other keys"),
    "a name twice": (
        assembled(b'{"a":' + json.dumps(entry(0, 24)).encode() + b',"a":1}'),
        "'a' stands twice",
    ),
    "deep": (assembled(b'{"a":' * 100_000), "nested deeper"),
    "metadata": (assembled({"__metadata__": {"a": 1}, "a": entry(0, 24)}), "metadata"),
    "a list": (assembled([]), "no JSON object"),
    "a pickle": (b"\x80\x04\x95" + bytes(200), "ends inside its header"),
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
    assert str(from_memory.value) == str(from_file.value)
    assert str(from_file.value).startswith(f"{path}: no valid safetensors file (")
    assert "\n" not in str(from_file.value)


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
