"""The recipes' names, and the first line that each says of itself, without importing torch."""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import trainer
from common.errors import ConfigError
from launch.nearest import unknown


@functools.cache
def recipes() -> Mapping[str, str]:
    """Names, SimCLR's first. The files are read and not run: that would take seconds."""
    found = {}
    families = Path(trainer.__path__[0], "recipes").glob("*.py")
    for family in sorted(families, key=lambda file: (file.stem != "simclr", file)):
        for node in ast.parse(family.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name != "named":  # what recipes share
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                found[node.name.replace("_", "-")] = first.rstrip(".")
    return found


def check_recipe(name: str) -> None:
    """Refuse a recipe that there is not.

    Raises:
        ConfigError: names the nearest.
    """
    if name not in recipes():
        raise ConfigError(unknown("recipe", name, recipes()))
