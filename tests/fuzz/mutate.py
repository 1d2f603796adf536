"""Mutations that keep most of a file's structure: random bytes fail at the first check."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Span = tuple[int, int]
"""Where a number lies in a file: offset and width in bytes."""

_RAW = "\x01raw:"  # a text that stands for itself in JSON, without quotes
_EXTREME_JSON = [
    *("null", "true", "0", "-1", "1", "4294967296", "9223372036854775807", "18446744073709551616"),
    *("1" * 5000, "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity", "1.5", '""', '"a"'),
    *('"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"/"', "[]", "{}", "[[]]", "[1,2]"),
    *("[" * 70 + "]" * 70, "[" * 5000, '{"a":' * 80 + "1" + "}" * 80, '{"":{"":[]}}'),
    *('"!!python/object/apply:os.system [id]"', '"' + "x" * 3000 + '"', "[1e999]", '"nan"'),
]


def mutate_bytes(
    rng: random.Random, data: bytes, spans: Sequence[Span], others: Sequence[bytes]
) -> bytes:
    """One to four changes: of numbers at ``spans`` mostly, of any bytes, cuts and splices."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        kind = rng.random()
        if spans and kind < 0.65:
            _set_number(rng, changed, rng.choice(spans), spans)
        elif kind < 0.85:
            _change_bytes(rng, changed)
        elif kind < 0.95:
            _resize(rng, changed)
        else:
            other = rng.choice(others)
            at, start = rng.randrange(len(changed) + 1), rng.randrange(len(other) + 1)
            changed[at:] = other[start:]
    return bytes(changed)


def _set_number(rng: random.Random, data: bytearray, span: Span, spans: Sequence[Span]) -> None:
    at, width = span
    if at + width > len(data):
        return
    top = 1 << (8 * width)
    value = int.from_bytes(data[at : at + width], "little")
    there, length = rng.choice(spans)
    elsewhere = int.from_bytes(data[there : there + length], "little")
    value = rng.choice(
        (
            *(0, 1, 2, top - 1, top >> 1, (top >> 1) - 1, value + 1, value - 1, value * 2),
            *(value ^ (1 << rng.randrange(8 * width)), elsewhere, len(data), len(data) - value),
            *(value + rng.randrange(-64, 64), rng.randrange(top), 1 << rng.randrange(8 * width)),
        )
    )
    data[at : at + width] = (value % top).to_bytes(width, "little")


def _change_bytes(rng: random.Random, data: bytearray) -> None:
    if not data:
        return
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[at] ^= 1 << rng.randrange(8)
    else:
        count = rng.choice((1, 1, 2, 4, 8, 32))
        data[at : at + count] = rng.randbytes(min(count, len(data) - at))


def _resize(rng: random.Random, data: bytearray) -> None:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    last = min(last, first + rng.choice((1, 8, 24, 1000, len(data) + 1)))
    action = rng.randrange(3)
    if action == 0:
        del data[first:last]
    elif action == 1:
        data[first:first] = data[first:last]
    else:
        del data[last:]


def mutate_json(rng: random.Random, text: bytes, others: Sequence[bytes]) -> bytes:
    """One to three changes to the values of a JSON text; now and then to its bytes."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, text, (), others)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if places:
            _change_json(rng, *rng.choice(places))
    changed = _dump(tree)
    return changed if rng.random() < 0.85 else mutate_bytes(rng, changed, (), others)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index), whatever the nesting."""
    found, waiting = [], [tree] if isinstance(tree, dict | list) else []
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


def _change_json(rng: random.Random, node: Any, key: Any) -> None:
    value, kind = node[key], rng.random()
    if kind < 0.5:
        node[key] = _RAW + rng.choice(_EXTREME_JSON)
    elif kind < 0.6 and type(value) is int:
        node[key] = value + rng.choice((-1, 1, 7, -value - 1, 1 << 40))
    elif kind < 0.7:
        del node[key]
    elif kind < 0.8 and isinstance(node, dict):
        # The same key again: a raw name ends its own text early.
        node[f'{_RAW}{json.dumps(key)}:{rng.choice(_EXTREME_JSON)},"x'] = value
    elif kind < 0.9 and isinstance(node, dict):
        node[rng.choice(("x", "", "__class__", "path", key + "s"))] = value
    elif isinstance(node, list):
        node.append(value)
    else:
        node[key] = [value]


def _dump(tree: Any) -> bytes:
    parts: list[str] = []
    _write(tree, parts.append)
    return "".join(parts).encode("utf-8", "surrogatepass")


def _write(node: Any, say: Callable[[str], None]) -> None:
    if isinstance(node, dict):
        say("{")
        for number, (key, value) in enumerate(node.items()):
            raw = key.startswith(_RAW)
            say("," if number else "")
            say((key.removeprefix(_RAW) + '"' if raw else json.dumps(key)) + ":")
            _write(value, say)
        say("}")
    elif isinstance(node, list):
        say("[")
        for number, value in enumerate(node):
            say("," if number else "")
            _write(value, say)
        say("]")
    elif isinstance(node, str) and node.startswith(_RAW):
        say(node.removeprefix(_RAW))
    else:
        say(json.dumps(node))
