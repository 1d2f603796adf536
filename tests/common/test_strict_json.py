"""JSON means one thing, within bounds, or it is refused."""

import os
from pathlib import Path

import pytest

from common.errors import DataError
from common.files.strict_json import MAX_DEPTH, dump_json, parse_json, read_json_file

pytestmark = pytest.mark.reliability(30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": NaN}', "'NaN' is not finite"),
        (b"[-Infinity]", "not finite"),
        (b"[1e999]", "'1e999' is not finite"),
        (b"[18446744073709551616]", "does not fit 64 bits"),
        (b"[" + b"9" * 100_000 + b"]", r"'9{40}\.\.\.' does not fit"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested deeper than 64"),
        (b'{"a":' * 500_000, "nested deeper than 64"),
        (b"{'a': 1}", "Expecting property name"),
        (b"\xff", "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        (b"!!python/object/apply:os.system [id]", "Expecting value"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_ambiguous_or_boundless_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_json(text)
    assert len(str(refused.value)) < 200


def test_what_our_own_files_hold_is_read() -> None:
    text = b'{"a": [1, -1.5, 1e-7, true, null, 18446744073709551615], "\\udcff": "\\u0000"}'
    assert parse_json(text)["a"] == [1, -1.5, 1e-7, True, None, 2**64 - 1]
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_what_is_not_finite_is_written_as_null_and_nothing_else_is() -> None:
    values = {"loss": float("nan"), "norms": [1.5, float("-inf"), (float("inf"), "nan")], "n": 2}
    assert parse_json(dump_json(values).encode()) == {
        "loss": None,
        "norms": [1.5, None, [None, "nan"]],
        "n": 2,
    }
    assert dump_json({"b": 1.0, "a": None}, indent=1, sort_keys=True) == (
        '{\n "a": null,\n "b": 1.0\n}'
    )


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    """A search through all keys for each of them would take an hour."""
    keys = ",".join(f'"{i}":0' for i in [*range(50_000), 49_999])
    with pytest.raises(ValueError, match="'49999' stands twice"):
        parse_json(f"{{{keys}}}".encode())


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": 1, "a": 1}')
    with pytest.raises(DataError, match=r"x\.json: not JSON \(the key 'a' stands twice"):
        read_json_file(path)
    path.write_bytes(b"[1]")
    with pytest.raises(DataError, match=r"x\.json: holds no JSON object"):
        read_json_file(path)
    path.write_bytes(b" " * 1000 + b"{}")
    with pytest.raises(DataError, match=r"x\.json: larger than 100 bytes"):
        read_json_file(path, max_bytes=100)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"pipe\.json: not a regular file"):
        read_json_file(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json_file(tmp_path / "missing.json")
