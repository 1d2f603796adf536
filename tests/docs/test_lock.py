"""requirements-docs.lock: what `make docs` needs, beside requirements.lock and never against it."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.pages import CHECKOUT
from tests.launch.test_setup import closure, pins


def docs_requirements() -> list[Requirement]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["optional-dependencies"]["docs"]]


def test_lock_leaves_the_others_alone() -> None:
    locked = pins("requirements-docs.lock")
    assert not set(locked) & set(pins("requirements.lock"))
    for name, version in pins("requirements-bench.lock").items():
        assert locked.get(name, version) == version
    for requirement in docs_requirements():
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


@pytest.mark.slow  # needs `launch/setup.sh docs`, as `make test-all` runs it
def test_lock_has_all_that_sphinx_needs_and_nothing_else() -> None:
    locked = pins("requirements-docs.lock")
    wanted = closure(docs_requirements()) - set(pins("requirements.lock"))
    assert set(locked) == wanted
    assert {name: installed(name) for name in locked} == locked


def installed(name: str) -> str:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return "none"
