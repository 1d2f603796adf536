"""A run that has ended says what came of it, and which commands go on from it."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from launch import pretrain_command
from launch.__main__ import main
from tests.trainer.runs import pack_images

TINY = ["--batch", "12", "--steps", "2", "--precision", "fp32", "--device", "cpu"]
TINY += ["--loader.backend", "torchvision", "--loader.workers", "1", "--head.hidden-dim", "32"]
TINY += ["--telemetry.no-tensorboard", "--crop.size", "32"]


def pretrain(data: Path, out: Path, *words: str) -> list[str]:
    return [
        "pretrain",
        "simclr-stl10-r18",
        "--data.train",
        str(data),
        "--out",
        str(out),
        *TINY,
        *words,
    ]


@pytest.mark.slow
def test_the_commands_after_a_run_work_as_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pack_images(tmp_path, count=24), tmp_path / "runs" / "it's one"
    assert main(pretrain(data, out, "--data.test", str(data))) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("done      step 2 of 2, loss ")
    assert said[1] == f"saved     {out}/checkpoints/step-00000002"
    assert Path(said[1].removeprefix("saved     ")).is_dir()
    assert said[2].startswith("kNN       ")
    assert said[3] == "next"
    methods = []
    for line in said[4:]:
        program, *words = shlex.split(line)
        assert shutil.which(program) is not None
        assert main(words) == 0, line
        methods.append(words[0])
    assert methods == ["evaluate", "report", "export"]
    assert [path.name for path in (out / "evaluation").iterdir()] == ["linear.json"]


def test_a_run_without_labels_is_diagnosed_and_its_own_encoder_exported_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pack_images(tmp_path, count=24), tmp_path / "run"
    own = ["--encoder.name", "tests.trainer.runs:small_encoder", "--encoder.no-zero-init-residual"]
    assert main(pretrain(data, out, *own)) == 0
    said = capsys.readouterr().out
    assert "kNN" not in said
    assert f" evaluate diagnose {out}\n" in said
    assert said.endswith(f" export {out} --format torch-export --out {out}/encoder.pt2\n")


def test_the_program_is_called_as_this_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "my venv" / "bin" / "widebatch"
    program.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert pretrain_command._program() == f"'{program}'"
    program.touch(mode=0o700)
    monkeypatch.setenv("PATH", str(program.parent))
    assert pretrain_command._program() == "widebatch"
