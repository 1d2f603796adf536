"""The demo: every command of it works, and stopping or failing leaves a clear way on."""

import json
import sys

import pytest

from launch import demo
from launch.exit_codes import ExitCode


def step(*command):
    return demo.Step("A step", (command,))


@pytest.fixture
def commands(monkeypatch):
    """Notes commands instead of running them; ``commands.fail_at`` makes one fail."""

    class Commands(list):
        fail_at = ""

        def run(self, command):
            self.append(list(command))
            return 3 if self.fail_at and self.fail_at in command else 0

    noted = Commands()
    monkeypatch.setattr(demo, "run_command", noted.run)
    monkeypatch.setattr(demo, "_summary", lambda out, seconds: None)
    return noted


def test_a_second_demo_begins_anew(commands, tmp_path):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out)]) == ExitCode.DONE
    (out / "run").mkdir()
    (out / "run" / "config.json").touch()
    (out / "mine.txt").touch()
    assert demo.main(["--out", str(out)]) == ExitCode.DONE
    assert not (out / "run").exists()
    assert (out / "mine.txt").exists()


def test_a_stopped_demo_is_gone_on_with(commands, tmp_path):
    out = tmp_path / "demo"
    commands.fail_at = "pretrain"
    assert demo.main(["--out", str(out)]) == ExitCode.FATAL
    (out / "run").mkdir()
    commands.fail_at = ""
    assert demo.main(["--out", str(out)]) == ExitCode.DONE
    assert (out / "run").exists()


def test_another_demo_in_the_same_folder_does_not_trip_over_the_first(commands, tmp_path):
    """A quick run's checkpoint must not meet the full run's settings."""
    out = tmp_path / "demo"
    commands.fail_at = "report"
    demo.main(["--out", str(out), "--quick"])
    (out / "run").mkdir()
    commands.fail_at = ""
    assert demo.main(["--out", str(out)]) == ExitCode.DONE
    assert not (out / "run").exists()


def test_a_folder_with_other_files_is_refused_untouched(commands, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert demo.main(["--out", str(tmp_path)]) == ExitCode.USAGE
    assert "holds files of other origin" in capsys.readouterr().err
    assert (tmp_path / "run").exists()
    assert commands == []


def test_a_failing_step_ends_the_demo_and_is_named(commands, tmp_path, capsys):
    commands.fail_at = "export"
    assert demo.main(["--out", str(tmp_path / "demo")]) == ExitCode.FATAL
    message = capsys.readouterr().err
    assert "Export the encoder" in message
    assert "status 3" in message
    assert not any("report" in command for command in commands)


def test_every_command_is_shown_before_it_runs(commands, tmp_path, capsys):
    demo.main(["--out", str(tmp_path / "demo")])
    shown = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert shown == [demo.shlex.join(command) for command in commands]


def test_interrupted_the_demo_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_command", interrupt)
    assert demo.main(["--out", str(tmp_path / "demo")]) == ExitCode.INTERRUPTED
    assert "goes on from here" in capsys.readouterr().err


def test_a_commands_status_is_passed_on(monkeypatch):
    monkeypatch.setattr(demo.sys, "executable", sys.executable)
    assert demo.run_command(("python", "-c", "raise SystemExit(7)")) == 7
    assert demo.run_command(("python", "-c", "")) == 0


def test_the_table_gives_the_margin_as_measured(tmp_path):
    for method in ("linear", "knn"):
        for name, top1 in (("raw pixels", 0.2), ("untrained encoder", 0.1), ("pretrained", 0.65)):
            path = demo.evaluation_file(tmp_path, method, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"top1": top1, "n_test": 720}))
    text = "\n".join(demo.table(tmp_path))
    assert "+55.0 points from the untrained encoder, +45.0 from raw pixels" in text
    assert "720 drawings of 360" in text


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
