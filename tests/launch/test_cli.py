"""What a user sees who types something wrong, or asks for help."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import DataError
from data_pipeline.reading.beton import sample_count
from launch.__main__ import main
from tests.said import error_line
from tests.trainer.runs import pack_images


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["pack", "--help"],
        ["pretrain", "--help"],
        ["plan", "--help"],
        ["evaluate", "--help"],
        ["export", "--help"],
        ["report", "--help"],
        ["runs", "--help"],
        ["completion", "--help"],
    ],
    ids=" ".join,
)
def test_help_answers_without_loading_torch(arguments: list[str]) -> None:
    result = _without_torch(arguments)
    assert result.returncode == 0, result.stderr
    assert "widebatch" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train", "x.beton"], "x.beton: no such file"),
        ([], "--data.train FILE is required"),
        (["--data.train", "{data}", "--data.test", "{folder}"], "pack it first: widebatch pack "),
        (["--data.train", __file__], "test_cli.py: not a .beton"),
        (["--data.train", "{data}", "--out", "{data}/run"], "exists and is no folder"),
    ],
    ids=["no file", "nothing", "folder", "no .beton", "out"],
)
def test_wrong_files_are_told_without_loading_torch(
    data: Path, arguments: list[str], message: str
) -> None:
    filled = [word.format(data=data, folder=data.parent) for word in arguments]
    result = _without_torch(["pretrain", "simclr-r50", *filled])
    assert result.returncode == 2
    assert message in error_line(result.stderr)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "simclr-r5"], "did you mean simclr-r50?"),
        (["plan", "simclr-r50", "--bacth", "8"], "did you mean --batch?"),
        (["plan", "simclr-r50", "--gpus", "8"], "nearest with its --gpu-memory-gib)"),
        (
            ["plan", "simclr-r50", "--gpu", "v100"],
            "nearest with its --gpu-memory-gib)",
        ),
        (["pretrain", "simclr-r50", "--data.trian", "a.beton"], "did you mean --data.train?"),
        (["pack", "photos", "out.beton", "--qualty", "3"], "did you mean --quality?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_told_without_loading_torch(arguments: list[str], said: str) -> None:
    result = _without_torch(arguments)
    assert result.returncode == 2
    assert said in error_line(result.stderr)


def _without_torch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command; fails where it loads one of the packages that take seconds."""
    code = (
        "import sys; from launch.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numba', 'ffcv', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_that_packs_a_folder_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my photos v1.2"
    folder.mkdir()
    with pytest.raises(DataError) as refused:
        sample_count(folder)
    command = str(refused.value).partition("pack it first: ")[2]
    assert shlex.split(command) == ["widebatch", "pack", str(folder), "my photos v1.2.beton"]


def test_the_list_of_recipes_is_the_trainers() -> None:
    from launch.settings_arguments import recipes
    from trainer.recipes import RECIPES

    assert set(recipes()) == set(RECIPES)
    for name, build in RECIPES.items():
        assert build().recipe == name
        assert build.__doc__ is not None and build.__doc__.startswith(recipes()[name])


def test_help_of_a_recipe_explains_settings_with_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrain", "simclr-r50", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for setting in ("--data.train", "--optim.base-lr", "--objective.temperature"):
        assert f"{setting} " in text
    assert (
        "--batch INT Global batch: images per optimizer step over all processes. (default: 4096)"
    ) in text
    assert text.count("(default:") + text.count("(required)") > 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["pertain"], "pertain"),
        (["pretrain", "simclr-r5"], "did you mean simclr-r50?"),
        (["pretrain", "nonsense"], "choose from simclr-r50"),
        (["pretrain", "simclr-r50", "--data.train", "none.beton"], "none.beton"),
        (["pretrain", "simclr-r50", "--data.train", __file__], "test_cli.py"),
        (["evaluate", "knn", "nowhere"], "nowhere: no such run folder or weights file"),
        (["evaluate", "knn", __file__], "torch-export and onnx cannot be evaluated: name the run"),
        (["export", "nowhere", "--out", "out.safetensors"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["pack", "nowhere", "out.beton"], "nowhere"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    empty_folder: Path,
) -> None:
    assert main(arguments) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not list(empty_folder.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--batch", "13"], "more than the 12 samples"),
        (["--batch", "1"], "must be a number from 2"),
        (["--batch", "6", "--epochs", "0.1"], "needs at least 1"),
        (["--batch", "6", "--encoder.name", "resnet19"], "resnet18"),
        (["--batch", "6", "--out", __file__], "is no folder"),
        (["--batch", "6", "--loader.backend", "torchvision", "--out", "/proc/x"], "/proc/x"),
        (["--batch", "6", "--loader.backend", "torchvision", "--encoder.name", "no.such:x"], "no."),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_settings_that_cannot_work_are_refused_before_step_0(
    data: Path,
    settings: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out = [] if "--out" in settings else ["--out", str(tmp_path / "runs" / "run")]
    arguments = ["pretrain", "simclr-cifar10-r18", "--data.train", str(data), *out, *settings]
    assert main(arguments) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--bacth", "6"], "--bacth"),
        (["--batch", "many"], "--batch"),
        ([], "--data.train"),
    ],
    ids=["unknown setting", "wrong type", "required setting missing"],
)
def test_misspelt_settings_are_explained(
    settings: list[str], message: str, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    train = ["--data.train", str(data)] if settings else []
    assert main(["pretrain", "simclr-r50", *train, *settings]) == 2
    assert message in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "nonsense", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["pretrain", "nonsense"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_another_projects_kernels_package_is_recognised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kernels

    monkeypatch.delattr(kernels, "WIDEBATCH")
    assert main(["--version"]) == 1
    assert "another project's package named 'kernels'" in error_line(capsys.readouterr().err)


def test_it_works_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('not ours')")
    program = Path(sys.executable).parent / "widebatch"
    result = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_what_other_libraries_note_is_not_said(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging; from launch.command_line import _configure_logging;"
        "_configure_logging(verbose=False);"
        "logging.getLogger('onnx_ir.passes').info('Removed 182 unused nodes');"
        "logging.getLogger('onnx_ir').warning('a warning');"
        "logging.getLogger('trainer.loop').info('ours')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    said = capfd.readouterr().err
    assert "unused nodes" not in said
    assert "a warning" in said and "ours" in said


def test_verbose_says_how_kernels_are_computed(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from launch.command_line import _configure_logging;"
        "_configure_logging(verbose='--verbose' in sys.argv);"
        "from kernels.dispatch import Choice, record;"
        "record(Choice('ntxent', 'blocked', 'no GPU here'))"
    )
    for flag, said in ((["--verbose"], True), ([], False)):
        subprocess.run([sys.executable, "-c", code, *flag], check=True)
        assert ("ntxent: blocked: no GPU here" in capfd.readouterr().err) is said


def test_lines_stand_above_a_progress_bar_and_not_in_it() -> None:
    code = (
        "import logging, sys; from launch.command_line import _configure_logging;"
        "_configure_logging(verbose=False); import tqdm;"
        "bar = tqdm.tqdm(total=9, initial=5, ncols=40, file=sys.stderr);"
        "logging.warning('a line'); bar.close()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [each for each in re.split("[\r\n]+", result.stderr) if "line" in each]
    assert len(lines) == 1 and "5/9" not in lines[0], result.stderr


@pytest.mark.parametrize(
    ("where", "name", "words"),
    [
        ("argparse", "ArgumentParser.print_help", ["--help"]),
        ("launch.pretrain_command", "_refuse_files", ["pretrain", "simclr-r50", "--help"]),
    ],
)
def test_ctrl_c_during_help_is_one_word(where: str, name: str, words: list[str]) -> None:
    code = (
        f"import os, signal, sys, {where}; from launch.__main__ import main;"
        f"{where}.{name} = lambda *_: os.kill(os.getpid(), signal.SIGINT);"
        f"sys.exit(main({words}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n"), result.stderr


def test_ctrl_c_while_the_command_line_is_imported_is_one_word() -> None:
    code = (
        "import os, signal, sys; from importlib.abc import MetaPathFinder; "
        "find = lambda self, name, *_: name == 'launch.command_line'"
        " and os.kill(os.getpid(), signal.SIGINT) or None;"
        "sys.meta_path.insert(0, type('F', (MetaPathFinder,), {'find_spec': find})());"
        "from launch.__main__ import main; sys.exit(main(['--help']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n"), result.stderr
