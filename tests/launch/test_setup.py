"""launch/setup.sh and the pinned set that it installs."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# What pyproject.toml does not name: FFCV's `cv2`, and what builds FFCV and this checkout.
INSTALLER = ["opencv-python-headless", "setuptools", "wheel"]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    split = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in split}


def project_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = project["dependencies"] + extras["demo"] + extras["dev"]
    return [Requirement(text) for text in texts if not text.startswith("widebatch[")]


def closure(requirements: list[Requirement]) -> set[str]:
    """Every package that installing ``requirements`` brings, by the installed metadata."""
    found: set[str] = set()
    done: set[tuple[str, frozenset[str]]] = set()
    while requirements:
        wanted = requirements.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        found.add(name)
        # requirements.lock says which of ffcv's needs are left out; and it may not be installed.
        if name == "ffcv" or (name, extras) in done:
            continue
        done.add((name, extras))
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras | {""}
            ):
                requirements.append(needed)
    return found


def test_pins_satisfy_what_the_project_asks_for() -> None:
    locked = pins("requirements.lock")
    for requirement in project_requirements():
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} has no pin in requirements.lock"
        assert requirement.specifier.contains(locked[name]), f"{requirement}: {locked[name]}"


def test_lock_has_all_that_its_packages_need_and_nothing_else() -> None:
    wanted = closure([*project_requirements(), *map(Requirement, INSTALLER)])
    assert set(pins("requirements.lock")) == wanted


def test_lock_of_the_peers_leaves_ours_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = pins("requirements-bench.lock")
    assert not set(locked) & set(pins("requirements.lock"))
    for text in project["optional-dependencies"]["bench"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_tests_run_on_the_pinned_versions() -> None:
    locked = pins("requirements.lock")
    del locked["ffcv"]  # missing where it cannot be built
    assert {name: distribution(name).version for name in locked} == locked


class Machine:
    """A checkout without .venv on a machine without compiler, with an apt-get that only notes."""

    def __init__(self, folder: Path, user: int) -> None:
        self.checkout, self.bin = folder / "my checkout", folder / "bin"
        (self.checkout / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "setup.sh", self.checkout / "launch")
        self.bin.mkdir()
        tools = "bash cat chmod cut date dirname env flock grep mkdir rm sed tail touch"
        for tool in tools.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or "")
        self.calls = folder / "apt-get.calls"
        self.calls.touch()
        self.program("id", f"echo {user}")
        self.program("apt-cache", '[ "$2" != python3.11 ]')
        self.program("apt-get", f'echo "$@" >>"{self.calls}"; exit "${{APT_STATUS:-0}}"')

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def setup(self, *stages: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "launch" / "setup.sh", *stages],
            env={"PATH": str(self.bin), "HOME": "/nonexistent", **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


def test_without_root_the_commands_to_run_are_printed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=1000)
    result = machine.setup("base", PYTHON=sys.executable)
    assert result.returncode == 1
    assert re.search(
        r"as root:\n.*apt-get update\n.*apt-get install -y --no-install-recommends .*g\+\+ "
        r".*libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev",
        result.stderr,
    )
    assert "add FFCV=no" in result.stderr
    assert machine.calls.read_text() == ""
    assert not (machine.checkout / ".venv" / "bin").exists()


def test_root_installs_only_what_is_missing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=0)
    machine.program("g++", "cat >/dev/null")  # and with it every header that it is asked for
    machine.program("ldconfig", "echo 'libtbb.so.12 (libc6) => /lib/libtbb.so.12'")
    result = machine.setup("base", PYTHON=sys.executable, APT_STATUS="100")
    assert result.returncode == 1
    update, install = machine.calls.read_text().splitlines()
    assert update.startswith("update")
    assert install.endswith(" pkg-config")
    # apt-get failed: the user is told what to run
    assert re.search("apt-get install -y --no-install-recommends .*pkg-config\n", result.stderr)


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_python_that_does_not_run_is_refused(tmp_path: Path, python: str) -> None:
    result = Machine(tmp_path, user=0).setup("base", PYTHON=python)
    assert result.returncode == 1
    assert f"PYTHON={python} is not a Python 3.11 or 3.12" in result.stdout + result.stderr


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    path = tmp_path / "my checkout" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True, timeout=60)
    return path


def call(function: str, venv: Path) -> subprocess.CompletedProcess[str]:
    """Call one function of setup.sh on an environment."""
    return subprocess.run(
        ["bash", "-c", f"source launch/setup.sh; venv=$1; {function}", "bash", venv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_half_deleted_or_moved_environment_is_made_anew(venv: Path) -> None:
    """One without pyvenv.cfg would have pip change the system's packages."""
    assert call("is_ready", venv).returncode == 0
    moved = venv.with_name("elsewhere")
    venv.rename(moved)
    assert call("is_ready", moved).returncode != 0
    moved.rename(venv)
    (venv / "pyvenv.cfg").unlink()
    assert call("is_ready", venv).returncode != 0
    listed = call("pip list", venv)
    assert (listed.returncode, listed.stdout) == (1, "")


def test_interrupted_packages_are_installed_again(venv: Path) -> None:
    """pip takes a package whose metadata is there for installed, whatever its files are."""
    site = next(venv.glob("lib/python*/site-packages"))

    def install(name: str) -> Path:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (site / f"{name}.py").write_text("x = 1\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{name}.py,sha256=abc,6\n{info.name}/RECORD,,\n")
        return info

    install("numpy")
    install("tyro")
    (site / "tyro.py").write_text("x")
    install("tqdm")
    (site / "tqdm.py").unlink()
    (install("absl_py") / "RECORD").unlink()
    (install("MarkupSafe") / "METADATA").write_text("")
    (install("kornia") / "METADATA").unlink()
    install("somebody_elses")
    (site / "somebody_elses.py").unlink()

    result = call("forget_broken_packages", venv)
    assert set(result.stdout.split()) == {"tyro", "tqdm", "absl_py", "MarkupSafe", "kornia"}
    left = {path.name for path in site.glob("*.dist-info")}
    assert left == {"numpy-1.0.dist-info", "somebody_elses-1.0.dist-info"}


def test_a_linked_environment_is_left_alone(tmp_path: Path) -> None:
    """``python -m venv --clear`` would empty the folder that the link leads to."""
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "setup.sh", checkout / "launch")
    other.mkdir()
    (other / "mine").touch()
    (checkout / ".venv").symlink_to(other)
    command = ["bash", "-c", "source launch/setup.sh; make_venv"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"is a link to {other}" in done.stderr
    assert (other / "mine").exists()
