"""The demo: every command of it works, and stopping or failing leaves a clear way on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import demo
from launch.exit_codes import ExitCode


@pytest.fixture
def commands(monkeypatch):
    """Notes commands, and makes their files, instead of running them."""

    class Commands(list):
        statuses: dict[str, int] = {}  # noqa: RUF012

        def run(self, command):
            self.append(command)
            status = self.statuses.get(command[0], 0)
            if status == 0 and "." in command[-1]:
                Path(command[-1]).parent.mkdir(parents=True, exist_ok=True)
                Path(command[-1]).write_text(json.dumps({"top1": 0.5}))
            return status

    noted = Commands()
    monkeypatch.setattr(demo, "run_command", noted.run)
    return noted


@pytest.mark.parametrize("fails", ["pretrain", "export", "report"])
def test_a_stopped_demo_is_gone_on_with(commands, fails, tmp_path):
    commands.statuses = {fails: ExitCode.FATAL}
    assert demo.main(["--out", str(tmp_path)]) == ExitCode.FATAL
    before = list(commands)
    commands.clear()
    commands.statuses = {}
    assert demo.main(["--out", str(tmp_path)]) == ExitCode.DONE
    planned = demo.plan(tmp_path, quick=False)
    assert fails in [command[0] for command in commands]
    assert set(before) | set(commands) == set(planned)
    assert {c[0] for c in before if c in commands} <= {"pretrain", fails}


def test_a_failing_command_ends_the_demo_with_its_status(commands, tmp_path, capsys):
    commands.statuses = {"export": 74}
    assert demo.main(["--out", str(tmp_path)]) == 74
    assert "failed with status 74, the lines above say why" in capsys.readouterr().err
    assert commands[-1][0] == "export"


def test_every_command_is_shown_before_it_runs(commands, tmp_path, capsys):
    demo.main(["--out", str(tmp_path)])
    shown = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert shown == [f"widebatch {shlex.join(command)}" for command in commands]


@pytest.mark.parametrize("status", [ExitCode.PREEMPTED, ExitCode.INTERRUPTED])
def test_interrupted_the_demo_says_how_to_go_on(commands, status, tmp_path, capsys):
    commands.statuses = {"pretrain": status}
    assert demo.main(["--out", str(tmp_path)]) == ExitCode.INTERRUPTED
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False], ids=["Ctrl-C", "SIGTERM to the demo alone"])
def test_a_signal_reaches_the_command_and_its_end_is_awaited(whole, tmp_path):
    program = tmp_path / "widebatch"
    program.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "def save(number, frame):\n    time.sleep(0.5)\n    print('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGINT, save)\nsignal.signal(signal.SIGTERM, save)\n"
        "print('began', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    code = (
        f"import sys; from launch import demo; sys.executable = {str(tmp_path / 'python')!r};"
        f"sys.exit(demo.main(['--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() != "began\n":
        pass
    time.sleep(0.2)
    if whole:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    said, errors = process.communicate(timeout=60)
    assert said == "saved\n"
    assert process.returncode == ExitCode.INTERRUPTED
    assert errors == "\ndemo: stopped; the same command goes on from here\n"


def test_the_table_holds_what_was_measured(tmp_path):
    for name, top1 in (("raw pixels", 0.2), ("untrained encoder", 0.1), ("pretrained", 0.65)):
        file = demo.evaluation_file(tmp_path, "linear", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"top1": top1}))
    rows = {line[:18].strip(): line[18:].split() for line in demo.table(tmp_path)}
    assert rows["raw pixels"] == ["20.0"] and rows["pretrained"] == ["65.0"]


@pytest.mark.slow
def test_the_quick_demo_makes_everything_it_names(tmp_path, capfd):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out), "--quick"]) == ExitCode.DONE
    shown = capfd.readouterr().out
    files = ["run/config.json", "run/metrics.jsonl", "report.html"]
    files += ["encoder.pt2", "encoder.json"]
    names = ("curves", "accuracy", "views", "neighbours", "map", "overview")
    for name in [*files, *(f"figures/{name}.png" for name in names)]:
        assert (out / name).is_file(), name
    assert "pretrained" in shown
    assert "report.html first" in shown
