"""Functions compiled by Numba and kept on disk, where that is possible.

A run never fails for want of a place to keep compiled code: a checkout that cannot be written and
no home, a full disk, a file torn by a crash. It compiles for some seconds more, and says so.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

log = logging.getLogger(__name__)


class _Cache(FunctionCache):
    """Numba's own, which would end the run where this one says what is wrong."""

    def __init__(self, function: Callable[..., Any], part: str) -> None:
        super().__init__(function)
        self._part = part

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None where it is to be compiled."""
        found = None
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # a torn pickle raises almost anything
            self._say(error)
        if found is None and self._part:
            _announce(self._part)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function if that can be."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # as above: the index is read before it is written
            self._say(error)

    def _say(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        _say(f"compiled code cannot be kept in {self.cache_path} ({why}): make room or delete it")


def compiled(part: str = "", **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: ``numba.njit(**options)``, kept on disk where that is possible.

    Args:
        part: what to say is being compiled, for functions that take many seconds.
        options: numba's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        made = njit(**options)(function)
        try:
            made._cache = _Cache(function, part)  # what cache=True does, with Numba's
        except (RuntimeError, OSError, UnicodeEncodeError):  # the last: its path is not UTF-8
            _say("no folder for compiled code can be written: name one in NUMBA_CACHE_DIR")
        return made

    return decorate


@functools.cache
def _announce(part: str) -> None:
    log.info("compiling %s for this processor: once, some 15 s of one core", part)


@functools.cache
def _say(what: str) -> None:
    log.info("%s; until then every start compiles for some seconds", what)
