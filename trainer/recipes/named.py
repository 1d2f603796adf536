"""What every recipe has in common."""

from pathlib import Path
from typing import Any

import tyro

from trainer.config import DataConfig


def named(recipe: str) -> dict[str, Any]:
    """Settings that a recipe's name decides, and the data, which the user is to name."""
    return {
        "recipe": recipe,
        "data": DataConfig(train=tyro.MISSING),
        "out": Path("runs", recipe),
    }
