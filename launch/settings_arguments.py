"""The settings of ``pretrain`` and ``plan``: read by tyro, which makes them from the dataclasses.

tyro tells errors in boxes of many lines; here they become one line, as everywhere else.
"""

import contextlib
import dataclasses
import inspect
import io
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from launch.first_look import given, refuse_unknown
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import RunConfig

_FRAME = "╭╮╰╯│─ \t"


def parse_settings(
    command: str,
    recipe: str,
    default: "RunConfig",
    words: Sequence[str],
    *,
    other_options: Iterable[str] = (),
    text: str = "",
) -> "RunConfig":
    """A recipe's configuration with the settings of the command line.

    What the recipe sets of a ResNet does not come along to another kind of encoder.

    Args:
        command: that they are given to, "pretrain" or "plan".
        recipe: its name.
        default: the recipe's configuration.
        words: of the command line.
        other_options: that the command has besides, which a mistyped word may mean.
        text: about the command, for ``--help``.

    Raises:
        ConfigError: a setting that there is not, or a value that it cannot have.
        SystemExit: ``--help`` has been answered.
    """
    import tyro

    from trainer.config import RunConfig
    from trainer.encoders import for_family
    from trainer.recipes import RECIPES

    prog = f"widebatch {command} {recipe}"
    _check_flags(prog, default, words, other_options)
    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                RunConfig,
                prog=prog,
                description=f"{about}\n\n{text}" if text else about,
                default=default,
                args=list(words),
            )
    except SystemExit as stop:
        if stop.code:
            line = _one_line(said.getvalue())
            raise ConfigError(f"{line}; see '{prog} --help'") from None
        raise
    sys.stderr.write(said.getvalue())  # warnings, if any
    return dataclasses.replace(config, encoder=for_family(config.encoder, default.encoder))


def _check_flags(
    prog: str, default: "RunConfig", words: Sequence[str], other_options: Iterable[str]
) -> None:
    from trainer.settings import settings

    found = settings(default)
    refuse_unknown(prog, words, [f for setting in found for f in setting.flags], other_options)
    if {"-h", "--help"} & set(words):
        return
    for setting in found:
        if setting.required and setting.flag not in given(words):
            kind = "FILE" if setting.is_path else "VALUE"
            raise ConfigError(f"{setting.flag} {kind} is required; see '{prog} --help'")


def _one_line(box: str) -> str:
    """What stands in a box above its first rule, on one line."""
    parts: list[str] = []
    for line in box.splitlines():
        inner = line.strip(_FRAME)
        if line.startswith("╭"):
            parts = []
        elif not inner and parts:
            break
        elif inner:
            parts.append(inner)
    return " ".join(parts).rstrip(". ")
