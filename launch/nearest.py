"""What somebody may have meant who mistyped a name."""

import difflib
from collections.abc import Iterable


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that ``word`` is most like, if any.

    A flag without its group is like the one with it: ``--base-lr`` is ``--optim.base-lr``.
    """
    known = list(names)
    tail = word.lstrip("-")
    in_a_group = [name for name in known if name.endswith(f".{tail}")]
    near = in_a_group or difflib.get_close_matches(word, known, n=1)
    return near[0] if near else None


def unknown(what: str, word: str, names: Iterable[str], otherwise: str = "") -> str:
    """The one line about a name that is none of ``names``.

    Args:
        what: kind of name: "option", "recipe".
        word: what was written.
        names: those that there are.
        otherwise: where to look when none is near; by default all names.
    """
    known = list(names)
    near = nearest(word, known)
    hint = f"did you mean {near}?" if near else otherwise or f"choose from {', '.join(known)}"
    return f"unknown {what} {word!r}; {hint}"
