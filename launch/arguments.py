"""argparse whose errors are one line and name the nearest thing that there is."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from common.errors import ConfigError
from launch.nearest import unknown


class Parser(argparse.ArgumentParser):
    """Like argparse's; sub-commands are of the same kind.

    Args:
        passes_on: words that it does not know are for another parser, as ``parse_known_args`` has
            it; else they are errors, told by the command that they belong to.
    """

    def __init__(self, *args: Any, passes_on: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes_on = passes_on
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse.

        Raises:
            ConfigError: in place of argparse's usage text and SystemExit.
        """
        self._words = list(args or ())
        found, rest = super().parse_known_args(args, namespace)
        if rest and not self._passes_on:
            self.error(f"unexpected {' '.join(rest)!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise; an option that does not exist is told before what is missing for want of it."""
        mistyped = None if self._passes_on else self._mistyped()
        name = self.prog.partition(" ")[2]
        help_words = f"see '{self.prog} --help'"
        if mistyped is not None:
            message = unknown("option", mistyped, self._options(), help_words)
        elif "did you mean" not in message:
            message = f"{message}; {help_words}"
        raise ConfigError(f"{name}: {message}" if name else message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """What argparse asks of a value that must be one of several."""
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            kind = str(action.metavar).lower()
            raise argparse.ArgumentError(None, unknown(kind, str(value), names))
        raise argparse.ArgumentError(action, unknown("value", str(value), names))

    def _options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def _mistyped(self) -> str | None:
        """The first option that is none, nor the beginning of one."""
        has_commands = any(isinstance(a, argparse._SubParsersAction) for a in self._actions)
        for word in self._words:
            # What follows a sub-command is for that to judge.
            if word == "--" or (has_commands and not word.startswith("-")):
                return None
            name = word.partition("=")[0]
            if name.startswith("--") and not any(o.startswith(name) for o in self._options()):
                return name
        return None
