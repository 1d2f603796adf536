"""docs/reference/ has every recipe, setting and command, as the program has them."""

import importlib.util
import re
from types import ModuleType

import pytest

from tests.docs.pages import DOCS
from trainer.recipes import RECIPES
from trainer.state.settings import settings


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """docs/reference_pages.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_are_those_of_the_recipes(reference: ModuleType) -> None:
    page = reference.settings_page()
    on_page = {flag for line in re.findall(r"^`(--.*)`$", page, re.M) for flag in flags_in(line)}
    wanted = {f for build in RECIPES.values() for s in settings(build()) for f in s.flags}
    assert on_page == wanted
    assert len(wanted) > 100


def flags_in(signature: str) -> list[str]:
    """``--compile, --no-compile`` or ``--batch INT``: the flags."""
    return re.findall(r"--[\w.-]+", signature)


def test_every_setting_is_explained(reference: ModuleType) -> None:
    page = reference.settings_page()
    entries = re.findall(r"^`(--.*)`\n: (.*)$", page, re.M)
    assert len(entries) > 100
    assert {name for name, text in entries if not text.strip()} == set()


def test_values_of_a_recipe_are_its_own(reference: ModuleType) -> None:
    page = reference.recipes_page()
    for name, build in RECIPES.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"| `--batch` | `{build().batch}` |" in section
        assert f"| `--optim.base-lr` | `{build().optim.base_lr}` |" in section
    assert set(re.findall(r"^## (.*)$", page, re.M)) == set(RECIPES)


def test_words_of_a_docstring_are_not_taken_for_markup(reference: ModuleType) -> None:
    marked = reference._marked("add --optim.base-lr 0.3 to <this> *or* `that --one`")
    assert marked == r"add `--optim.base-lr` 0.3 to \<this\> \*or\* `that --one`"


@pytest.mark.slow
def test_every_command_is_there_with_its_help(reference: ModuleType) -> None:
    page = reference.commands_page()
    headings = re.findall(r"^## widebatch ?(.*)$", page, re.M)
    for command in ("pack", "plan", "pretrain", "evaluate knn", "export", "report", "doctor"):
        assert command in headings
    assert page.count("```text\nusage: widebatch") == len(headings)
