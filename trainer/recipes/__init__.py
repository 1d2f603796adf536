"""Complete runs as functions, one file a family. A recipe names everything but the data.

Each docstring says where the settings come from and what to expect. Accuracies are linear-probe
top-1 as published, unless it says that this code measured them.
"""

from collections.abc import Callable

from trainer.config import RunConfig
from trainer.recipes import barlowtwins, deepclusterv2, moco, npid, rotation, simclr

RECIPES: dict[str, Callable[[], RunConfig]] = {
    name.replace("_", "-"): function
    for family in (simclr, moco, barlowtwins, deepclusterv2, npid, rotation)
    for name, function in vars(family).items()
    if getattr(function, "__module__", "") == family.__name__
}
"""What ``widebatch pretrain`` offers, by name."""
