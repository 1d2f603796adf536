"""RUN/README.md: true, private, and its commands work."""

import dataclasses
import json
import os
import shlex
import stat
from pathlib import Path

import pytest
import torch

from common.files.atomic_file import AtomicFile
from launch.settings_arguments import parse_settings
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.tiny import tiny_config, tiny_mocov3_config
from trainer.config import RunConfig, plan_run, to_json
from trainer.loop import Outcome, fit
from trainer.models.encoders import EncoderConfig
from trainer.objectives.moco import MoCoConfig
from trainer.report.page import write_page
from trainer.state.announce import command, readme, write_readme

VERSIONS = {"widebatch": "0.1.0", "commit": "abc+changes", "python": "3.11.7"}


def text_of(config: RunConfig, steps_done: int = 0) -> str:
    plan = plan_run(config, 48, 1)
    return readme(config, plan, torch.device("cpu"), VERSIONS, steps_done)


def absolute(config: RunConfig) -> RunConfig:
    data = dataclasses.replace(
        config.data, train=tuple(path.absolute() for path in config.data.train)
    )
    return dataclasses.replace(config, data=data, out=config.out.absolute())


@pytest.mark.parametrize("make", [tiny_config, tiny_mocov3_config])
def test_the_command_gives_the_same_settings_again(make: type) -> None:
    config: RunConfig = make(Path("it's here.beton"), Path("runs/a b"), resume="force")
    words = command(config)
    assert words is not None and words[:2] == ["widebatch", "pretrain"]
    assert shlex.join(words) in text_of(config)
    again = parse_settings("pretrain", words[2], words[3:])
    # How one start dealt with an earlier run is no setting of the next.
    assert to_json(again) == to_json(dataclasses.replace(absolute(config), resume="auto"))


def test_what_differs_from_the_recipe_is_in_a_table() -> None:
    text = text_of(tiny_config(Path("a.beton"), Path("runs/x")))
    assert "Recipe `simclr-cifar10-r18`: SimCLR on CIFAR-10" in text
    assert "| `batch` | `512` | `24` |" in text
    assert "`optim.name`" not in text
    plain = dataclasses.replace(tiny_config(Path("a"), Path("b")), recipe="")
    assert "Of no recipe" in text_of(plain) and "widebatch pretrain" not in text_of(plain)


def test_a_run_that_no_recipe_leads_to_has_no_command() -> None:
    odd = tiny_config(Path("a"), Path("b"), objective=MoCoConfig(queue=40))
    assert command(odd) is None
    assert "Its settings were made in Python" in text_of(odd)


def test_the_export_that_it_names_can_hold_the_encoder() -> None:
    config = tiny_config(Path("a.beton"), Path("b"))
    assert f"--format torchvision --out {config.out.absolute()}/encoder.safetensors" in text_of(
        config
    )
    for encoder in (SMALL_ENCODER, EncoderConfig(name="resnet8", stem="cifar")):
        other = dataclasses.replace(config, encoder=encoder)
        assert f"--format torch-export --out {config.out.absolute()}/encoder.pt2" in text_of(other)


def test_the_state_of_the_code_and_the_job_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    text = text_of(tiny_config(Path("a.beton"), Path("b")), steps_done=3)
    assert "commit abc, with changes that are not committed" in text
    assert "Slurm job: 4711" in text and "goes on from step 3" in text and "torch 2." in text
    monkeypatch.setenv("SLURM_JOB_ID", "`rm -r`")
    assert "rm -r" not in text_of(tiny_config(Path("a.beton"), Path("b")))


def test_a_full_disk_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: AtomicFile) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AtomicFile, "publish", full)
    config = tiny_config(Path("a.beton"), tmp_path)
    write_readme(config.out, text_of(config))
    assert "README.md: cannot be written (No space left on device)" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_run_writes_it_at_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    data = pack_images(tmp_path, count=48)
    config = tiny_config(data, tmp_path / "run", steps=4, encoder=SMALL_ENCODER)
    assert fit(config, lambda: True) is Outcome.STOPPED
    assert fit(config) is Outcome.DONE
    path = tmp_path / "run" / "README.md"
    text = path.read_text()
    assert "this one goes on from step 1" in text and "hunter2" not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["world_size"] == 1
    named = {line.split("`")[1].split("/")[0] for line in text.splitlines() if line[:3] == "- `"}
    assert {entry.name for entry in path.parent.iterdir()} <= {*named, "README.md"}


def test_a_folder_whose_name_is_no_text_gets_its_readme(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    out.mkdir()
    config = tiny_config(out / "a.beton", out)
    write_readme(config.out, text_of(config))
    assert "caf\\udce9/a.beton" in (out / "README.md").read_text()


def test_a_page_names_what_is_no_text(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", os.fsdecode(b"<p>caf\xe9</p>"))
    assert (tmp_path / "report.html").read_text() == "<p>caf\\udce9</p>"
