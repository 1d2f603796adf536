"""The settings of a run or an evaluation: read by tyro, which makes them from the dataclasses.

tyro tells errors in boxes of many lines; here they become one line, as everywhere else.
"""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import ConfigError
from launch.nearest import unknown

if TYPE_CHECKING:
    from tyro._errors import ParseErrorEvent

    from trainer.config import RunConfig

T = TypeVar("T")


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
        ConfigError, SystemExit: as :func:`parse`.
    """
    from trainer.models.encoders import for_family
    from trainer.recipes import RECIPES

    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "")
    text = f"{about}\n\n{text}" if text else about
    prog = f"widebatch {command} {recipe}"
    config = parse(prog, default, words, text=text, other_options=other_options)
    encoder = for_family(config.encoder, default.encoder, config.crop.size)
    return dataclasses.replace(config, encoder=encoder)


def parse(
    prog: str, default: T, words: Sequence[str], *, text: str, other_options: Iterable[str] = ()
) -> T:
    """A configuration with the settings of the command line.

    Args:
        prog: the words that stand before them.
        default: the configuration that they change, a dataclass.
        words: of the command line.
        text: for ``--help``.
        other_options: that there are besides, which a mistyped word may mean.

    Raises:
        ConfigError: a setting that there is not, or a value that it cannot have.
        SystemExit: ``--help`` has been answered.
    """
    import tyro
    from tyro._errors import on_parse_error

    from trainer.state.settings import settings

    options = [flag for setting in settings(default) for flag in setting.flags]

    def refuse(event: "ParseErrorEvent") -> None:
        raise ConfigError(_one_line(event, [*options, *other_options], f"see '{prog} --help'"))

    coloured = getattr(sys.stdout, "stream", sys.stdout)  # as --help may be
    with on_parse_error(refuse), contextlib.redirect_stdout(coloured):
        return tyro.cli(
            type(default), prog=prog, description=text, default=default, args=list(words)
        )


def _one_line(event: "ParseErrorEvent", options: Iterable[str], help_words: str) -> str:
    """What tyro found wrong, and what to do.

    Args:
        event: what was found.
        options: those that there are, of which a mistyped one may mean one.
        help_words: where to look.
    """
    from tyro import _errors as errors

    if isinstance(event, errors.InvalidChoice):
        return f"{event.argument.display_name()}: {unknown('value', event.value, event.choices)}"
    if isinstance(event, errors.BadValue):
        return f"{_named(event.argument, ' takes')}; {help_words}"
    if isinstance(event, errors.InstantiationFailure):
        if event.argument is None:  # our own refusal of values that do not go together
            return event.message
        return f"{_named(event.argument, ' takes')}: {event.message.splitlines()[0]}; {help_words}"
    words = vars(event).get("tokens") or vars(event).get("unrecognized_tokens") or []
    mistyped = [word.partition("=")[0] for word in words if word.startswith("-")]
    if mistyped:
        return unknown("option", mistyped[0], options, help_words)
    if isinstance(event, errors.MissingArgs):
        names = [_named(each.arg) for each in event.missing_arguments]
        return f"{', '.join(names)} is required; {help_words}"
    return f"unexpected {' '.join(words)!r}; {help_words}"


def _named(argument: Any, takes: str = "") -> str:
    """An option with its kind of value; the kind alone of a word that follows no option."""
    kind = argument.lowered.metavar
    return kind if argument.is_positional() else f"{argument.display_name()}{takes} {kind}"
