"""The messages that docs/troubleshooting.md quotes, and those that our source can say."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import CHECKOUT, DOCS

PAGE = DOCS / "troubleshooting.md"

# Messages of other programs, by the program.
FOREIGN = {
    "NCCL error": "NCCL, by way of torch",
    "Connection closed by peer": "gloo, by way of torch",
    "Address already in use": "the system, by way of torchrun",
    "CUDA out of memory": "torch",
    "Killed": "the system",
    "Requested node configuration is not available": "Slurm",
}

# Put together from two places of our source, by the code of the first.
COMPOSED = {
    "unknown recipe ...": 'unknown("recipe"',
    "unknown option ...": 'unknown("option"',
}

_HOLE = "\0"
_SHELL = ("launch/setup.sh", "slurm/common.sh")


def quoted() -> list[str]:
    """Messages of the page, with ``...`` for what differs."""
    return re.findall(r"^### `(.+)`$", PAGE.read_text(), flags=re.MULTILINE)


def messages() -> Iterator[str]:
    """Every text in our source, with a hole for each value that is put in."""
    for path in _files():
        yield from _texts(ast.parse(path.read_text(), str(path)))
    for name in _SHELL:
        yield from (CHECKOUT / name).read_text().splitlines()


def code() -> str:
    """Our source itself."""
    return "\n".join(path.read_text() for path in _files())


def _files() -> Iterator[Path]:
    for package in ("launch", "trainer", "data_pipeline", "kernels", "common"):
        yield from (CHECKOUT / package).rglob("*.py")


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%\.?\d*[sdfg]", _HOLE, node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else _HOLE for p in node.values)
            yield "".join(str(part) for part in parts)


def says(message: str, text: str) -> bool:
    """Whether ``text`` can be ``message``: its fixed parts are there, in their order."""
    at = 0
    for part in fixed_parts(message):
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def fixed_parts(message: str) -> list[str]:
    """What stands between the ``...`` of a message."""
    return [part for part in re.split(r"\.{3,}", message) if part.strip()]
