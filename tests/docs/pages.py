"""The commands of docs/*.md: every ``console`` block, page by page, in order.

A block in which a line begins with ``$ `` is a session: those lines are commands and the others
what they print. In any other block every line is a command. A line that ends in a backslash goes
on, and ``#`` begins a comment.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)


@dataclass
class Command:
    """One command of a page."""

    page: str
    """File in docs/."""
    text: str
    shown: list[str] = field(default_factory=list)
    """Lines of output that the page shows below it."""


def page_names() -> list[str]:
    """Pages with commands."""
    return [path.name for path in sorted(DOCS.glob("*.md")) if commands_of(path.name)]


def commands_of(page: str) -> list[Command]:
    """A page's commands, in order; those of a file that it includes are its own."""
    return [
        command for block in _BLOCK.findall(_text(DOCS / page)) for command in _parse(page, block)
    ]


def _text(path: Path) -> str:
    def included(match: re.Match[str]) -> str:
        return _text(path.parent / match[1])

    return _INCLUDE.sub(included, path.read_text())


def _parse(page: str, block: str) -> list[Command]:
    is_session = bool(re.search(r"^\$ ", block, re.MULTILINE))
    commands: list[Command] = []
    lines = iter(block.splitlines())
    for line in lines:
        if is_session and not line.startswith("$ "):
            assert commands, f"{page}: output before the first command: {line}"
            commands[-1].shown.append(line)
            continue
        text = line.removeprefix("$ ")
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + next(lines).strip()
        if text.strip() and not text.lstrip().startswith("#"):
            commands.append(Command(page, text))
    return commands
