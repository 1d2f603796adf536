"""HTML and SVG as nested calls, in which every text is escaped unless it is markup already."""

import html
import re
from collections.abc import Iterable
from typing import Any

# What XML and HTML do not allow even in escaped form, and halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"br", "img", "link", "meta", "wbr"})


class Html(str):
    """Text that is markup."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value for element or attribute content; :class:`Html` stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        children: texts, markup, numbers, nested iterables of these; ``None`` is nothing.
        attributes: ``class_`` and ``for_`` lose their last underscore, other underscores are
            hyphens; ``None`` and ``False`` are left out, ``True`` has no value.
    """
    opened = f"<{name}{''.join(map(_attribute, attributes, attributes.values()))}>"
    return Html(opened if name in _VOID else f"{opened}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children of an element, one after the other."""
    parts = []
    for child in children:
        if child is None:
            continue
        nested = isinstance(child, Iterable) and not isinstance(child, str)
        parts.append(join(child) if nested else text(child))
    return Html("".join(parts))


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(value)}"'
