"""Recipes and their settings: which there are, without importing torch, and tyro, which reads them.

tyro makes settings from the dataclasses, and tells errors in boxes of many lines; here they become
one line, as everywhere else. Names that there are not are found out before: a configuration's class
imports torch, which takes seconds, but its source can be read.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trainer
from common.errors import ConfigError
from launch.arguments import unknown

if TYPE_CHECKING:
    from tyro._errors import ParseErrorEvent

    from trainer.config import RunConfig

T = TypeVar("T")

_OURS = ("trainer", "data_pipeline", "kernels", "common")
_NUMBER = re.compile(r"\.\d+\.")


@functools.cache
def recipes() -> Mapping[str, str]:
    """Names, SimCLR's first, with the first line that each recipe says of itself."""
    found = {}
    families = [file.stem for file in Path(trainer.__path__[0], "recipes").glob("*.py")]
    for family in sorted(families, key=lambda name: (name != "simclr", name)):
        for node in _source(f"trainer.recipes.{family}").body:
            shared = isinstance(node, ast.FunctionDef) and node.name.startswith(("_", "named"))
            if isinstance(node, ast.FunctionDef) and not shared:
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                found[node.name.replace("_", "-")] = first.rstrip(".")
    return found


def check_recipe(name: str) -> None:
    """Refuse a recipe that there is not, by the nearest that there is."""
    if name not in recipes():
        raise ConfigError(unknown("recipe", name, recipes()))


@functools.cache
def run_options() -> Sequence[str]:
    """The flags of all settings of a run; those of every objective, whichever a recipe has."""
    ((module, config),) = _configs("trainer.config", ast.Name("RunConfig"))
    return list(_flags(module, config, ""))


def _flags(module: str, config: ast.ClassDef, group: str) -> Iterator[str]:
    """Of a configuration that stands in ``module``, below ``group``, which ends in a dot."""
    for base in config.bases:
        for home, part in _configs(module, base):
            yield from _flags(home, part, group)
    for field in config.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        hint = ast.unparse(field.annotation)
        if "Suppress" in hint or "ClassVar" in hint:
            continue
        _, renamed, rest = hint.partition("arg(name='")
        flag = rest.partition("'")[0] if renamed else field.target.id.replace("_", "-")
        parts = list(_configs(module, field.annotation))
        for home, part in parts:
            yield from _flags(home, part, f"{group}{flag}." if flag else group)
        if not parts:
            yield f"--{group}{flag}"
        if hint == "bool":
            yield f"--{group}no-{flag}"


def _configs(module: str, hint: ast.expr) -> Iterator[tuple[str, ast.ClassDef]]:
    """The dataclasses that a type names, or that stand behind a name in it, with their modules."""
    for leaf in ast.walk(hint):
        found = _definition(module, leaf.id) if isinstance(leaf, ast.Name) else None
        if found is None:
            continue
        home, node = found
        if isinstance(node, ast.Assign):
            yield from _configs(home, node.value)
        elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield home, node


def _definition(module: str, name: str) -> tuple[str, ast.ClassDef | ast.Assign] | None:
    """A class or another name for a type, and the module of ours that it is defined in."""
    for node in _source(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return module, node
        if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] not in _OURS:
            continue
        if name in (alias.name for alias in node.names):
            return _definition(str(node.module), name)
    return None


@functools.cache
def _source(module: str) -> ast.Module:
    path = Path(trainer.__path__[0]).parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def refuse_unknown(prog: str, words: Sequence[str], other_options: Sequence[str] = ()) -> None:
    """Refuse an option that is neither a setting of a run nor one of the command's others.

    Raises:
        ConfigError: names the nearest.
    """
    if {"-h", "--help"} & set(words):
        return
    known = [*run_options(), *other_options]
    for flag in (word.partition("=")[0] for word in words):
        # Of one of several tasks: its number is no part of a name.
        if flag.startswith("--") and _NUMBER.sub(".", flag.replace("_", "-")) not in known:
            raise ConfigError(unknown("option", flag, known, f"see '{prog} --help'"))


def parse_settings(
    command: str,
    recipe: str,
    words: Sequence[str],
    *,
    train: tuple[Path, ...] | None = None,
    other_options: Sequence[str] = (),
    text: str = "",
) -> "RunConfig":
    """A recipe's configuration with the settings of the command line.

    What the recipe sets of a ResNet does not come along to another kind of encoder.

    Args:
        command: that they are given to, "pretrain" or "plan".
        recipe, words, other_options: see :func:`parse`.
        train: the data where the words name none; None: they must.
        text: about the command, for ``--help``.
    """
    from trainer.config import DataConfig
    from trainer.models.encoders import for_family
    from trainer.recipes import RECIPES

    default = RECIPES[recipe]()
    if train is not None:
        default = dataclasses.replace(default, data=DataConfig(train=train))
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
        other_options: that there are besides, which a mistyped word may mean.

    Raises:
        ConfigError: a setting that there is not, or a value that it cannot have.
        SystemExit: ``--help`` has been answered.
    """
    import tyro
    from tyro import _strings
    from tyro._errors import on_parse_error

    from trainer.state.settings import settings

    found = settings(default)
    options = [flag for setting in found for flag in setting.flags]
    given = [word.partition("=")[0].replace("_", "-") for word in words]
    for setting in found:  # of several files; of other options the last one counts, as anywhere
        several = setting.is_path and not isinstance(setting.value, Path | None)
        if several and given.count(setting.flag) > 1:
            raise ConfigError(
                f"{setting.flag} stands more than once; name all files after one: "
                f"{setting.flag} FILE FILE"
            )

    def refuse(event: "ParseErrorEvent") -> None:
        raise ConfigError(_one_line(event, [*options, *other_options], f"see '{prog} --help'"))

    _strings.remove_single_line_breaks = _filled  # type: ignore[assignment]  # tyro's keeps the lines of indented docstrings
    coloured = getattr(sys.stdout, "stream", sys.stdout)  # as --help may be
    with on_parse_error(refuse), contextlib.redirect_stdout(coloured):
        return tyro.cli(
            type(default), prog=prog, description=text, default=default, args=list(words)
        )


def _filled(text: str) -> str:
    """Paragraphs as one line each, for a terminal of any width; lines of tables stay."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).split("\n"):
        if lines and lines[-1] and line and not line.startswith((" ", "- ")):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _one_line(event: "ParseErrorEvent", options: Iterable[str], help_words: str) -> str:
    """What tyro found wrong, and what to do: an option that is meant, or where to look."""
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
