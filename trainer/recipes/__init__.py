"""Complete runs as functions, one file a family. A recipe names everything but the data.

Each docstring says where the settings come from and what to expect. Accuracies are linear-probe
top-1 as published, unless it says that this code measured them.
"""

import importlib
import pkgutil
from collections.abc import Callable

from trainer.config import RunConfig

_FAMILIES = sorted(
    (module.name for module in pkgutil.iter_modules(__path__)),
    key=lambda name: (name != "simclr", name),
)

RECIPES: dict[str, Callable[[], RunConfig]] = {
    name.replace("_", "-"): function
    for family in (importlib.import_module(f"{__name__}.{name}") for name in _FAMILIES)
    for name, function in vars(family).items()
    if getattr(function, "__module__", "") == family.__name__
    and not name.startswith(("_", "named"))
}
"""What ``widebatch pretrain`` offers, by name: every function of a family that is not private."""
