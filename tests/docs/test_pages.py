"""Every command on the pages of docs/ runs, and prints what the page shows."""

import re
from pathlib import Path

import pytest

from tests.docs.forms import FORMS, NOT_RUN, PREPARED, form_of, reason_not_to_run
from tests.docs.pages import CHECKOUT, DOCS, Command, _parse, commands_of, page_names
from tests.docs.runner import _run, first_missing, follow, shell

ALL = [command for page in page_names() for command in commands_of(page)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=[pytest.mark.slurm] if name == "slurm.md" else [])
        for name in page_names()
    ],
)
def test_commands_of_a_page_run_as_it_says(page: str, tmp_path: Path) -> None:
    follow(page, tmp_path)


def test_every_command_runs_or_has_a_reason_not_to() -> None:
    assert len(ALL) > 40
    left_out = [command for command in ALL if reason_not_to_run(command.text)]
    assert len(left_out) < len(ALL) / 10, "the pages are tested, not excused"
    for form in (*FORMS, *NOT_RUN):
        assert len(form.reason) > 7, form


@pytest.mark.parametrize("form", [*FORMS, *NOT_RUN], ids=lambda form: form.pattern)
def test_no_form_is_left_over_from_a_command_that_is_gone(form: object) -> None:
    page = getattr(form, "page", "")
    before = FORMS[: FORMS.index(form)] if form in FORMS else ()
    texts = [command.text for command in ALL if page in ("", command.page)]
    for earlier in before:
        texts = [re.sub(earlier.pattern, earlier.instead, text) for text in texts]
    assert any(re.search(form.pattern, text) for text in texts)  # type: ignore[attr-defined]


def test_pages_that_are_made_ready_are_there() -> None:
    assert set(PREPARED) <= set(page_names())


def test_commands_and_output_are_told_apart() -> None:
    session = "$ widebatch pack a \\\n    b.beton\nb.beton: 3 images\n...\n$ ls # what is there\n"
    assert _parse("page", session) == [
        Command("page", "widebatch pack a b.beton", ["b.beton: 3 images", "..."]),
        Command("page", "ls # what is there", []),
    ]
    assert _parse("page", "# a comment\nls\nls -l\n") == [
        Command("page", "ls"),
        Command("page", "ls -l"),
    ]


def test_the_system_packages_to_install_are_those_of_the_set_up() -> None:
    """The one command that is never run."""
    needs = (CHECKOUT / "launch" / "setup.sh").read_text()
    command = next(c.text for c in commands_of("install.md") if c.text.startswith("apt-get inst"))
    packages = [word for word in command.split()[2:] if not word.startswith("-")]
    assert len(packages) > 4
    assert [package for package in packages if f" {package}" not in needs] == []


def test_no_block_of_commands_has_another_name() -> None:
    """``bash`` and ``sh`` blocks would not be run."""
    for path in DOCS.glob("*.md"):
        names = set(re.findall(r"^```(\S+)", path.read_text(), re.MULTILINE))
        assert not names & {"bash", "sh", "shell", "shell-session"}, path.name


def test_shown_lines_are_compared_but_for_numbers() -> None:
    printed = [
        "2026-01-02 03:04:05 step 4/4  loss 5.6",
        "a: 12 images in 0.1 s",
        "sha256 0123456789ab",
    ]
    assert first_missing(["step 1/9  loss 7.25", "...", "sha256 ffffffffffff"], printed) is None
    assert first_missing(["a: 7 pictures in 1 s"], printed) == "a: 7 pictures in 1 s"
    assert first_missing(["sha256 ffffffffffff", "step 1/9  loss 7.25"], printed) is not None


def test_a_form_changes_what_it_names_and_nothing_else() -> None:
    assert form_of("widebatch --version", "install.md") == "widebatch --version"
    torchrun = "torchrun --nproc-per-node 8 --no-python widebatch"
    assert "--nproc-per-node 2 " in form_of(torchrun, "x.md")


def test_a_shell_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    assert shell("mkdir there; cd there; export WORD='two words'", tmp_path) == (0, "")
    assert shell('echo "$WORD in $PWD"', tmp_path) == (0, f"two words in {tmp_path}/there\n")


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (Command("page", "echo why; exit 3"), "exit code 3\n.*why"),
        (Command("page", "false | cat"), "exit code 1"),
        (Command("page", "echo 3 images", ["4 pictures"]), "not printed: 4 pictures\n.*3 images"),
    ],
    ids=["status", "status in a pipe", "output"],
)
def test_a_command_that_does_not_do_as_the_page_says_is_told(
    command: Command, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError) as caught:
        _run(command, tmp_path)
    assert re.search(problem, str(caught.value), re.DOTALL)
