"""`widebatch runs`: states from traces, speed from tails, damage as a line."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.runs_command import table
from trainer.health import heartbeat
from trainer.health.heartbeat import Heartbeat
from trainer.state.run_list import RunFacts, _lines_from_the_end, list_runs

GONE = Heartbeat(rank=0, host=heartbeat.own(0).host, pid=2**22 + 1, started=1, step=7)


def make_run(
    folder: Path,
    *,
    step: int = 8,
    total: int = 20,
    saved: int | None = 8,
    beats: tuple[Heartbeat, ...] = (dataclasses.replace(GONE, ended="done"),),
    **last: Any,
) -> Path:
    """A run's folder as the trainer leaves it, without weights."""
    folder.mkdir(parents=True)
    facts = {"total_steps": total, "steps_per_epoch": 4, "world_size": max(1, len(beats))}
    (folder / "config.json").write_text(json.dumps({"recipe": "simclr-r50", "run": facts}))
    records = [
        {"step": n, "loss": 2.0, "images_per_second": 50.5, "epoch": n // 4}
        for n in range(1, step + 1)
    ]
    if step > 4:
        records[3].update(knn_top1=0.5, knn_best_top1=0.625)
    if records:
        records[-1].update(last)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if saved is not None:
        (folder / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
        (folder / "checkpoints" / "latest.json").write_text(json.dumps({"step": saved}))
    for beat in beats:
        heartbeat.write(folder / "heartbeats", beat)
    return folder


def state(folder: Path) -> tuple[str, str]:
    (found,) = list_runs([folder])
    return found.state, found.why


def test_a_run_is_told_in_a_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "first")
    (found,) = list_runs([tmp_path / "runs"])
    assert (found.age_seconds or 0) < 60
    expected = RunFacts(
        name="first",
        path=str(run),
        state="stopped",
        recipe="simclr-r50",
        step=8,
        total_steps=20,
        epoch=2.0,
        loss=2.0,
        knn_top1=0.5,
        knn_best_top1=0.625,
        images_per_second=50.5,
        ranks=1,
    )
    assert dataclasses.replace(found, age_seconds=None) == expected


def test_states_are_told_by_the_traces_of_processes(tmp_path: Path) -> None:
    ended = dataclasses.replace(GONE, ended="NumericalError")
    said = dataclasses.replace(GONE, ended="ConfigError", why="--k: too large")
    lost = dataclasses.replace(GONE, rank=1, ended="RankLostError")
    mine, elsewhere = heartbeat.own(0), dataclasses.replace(GONE, host="node-7")
    for name, wanted, options in (
        ("done", ("finished", ""), {"step": 20, "saved": 20}),
        ("asked", ("stopped", ""), {}),
        ("killed", ("stopped", "killed, 3 steps to repeat"), {"step": 11, "beats": (GONE,)}),
        (
            "early",
            ("failed", "killed before its first checkpoint"),
            {"saved": None, "beats": (GONE,)},
        ),
        ("at once", ("stopped", "ended before its first checkpoint"), {"saved": None}),
        ("error", ("failed", "NumericalError on rank 0 at step 7"), {"beats": (ended, lost)}),
        ("why", ("failed", "ConfigError on rank 0 at step 7: --k: too large"), {"beats": (said,)}),
        (
            "hung",
            ("failed", "hung; RUN/stacks says where"),
            {"beats": (dataclasses.replace(GONE, hung=True),)},
        ),
        ("lives", ("running", ""), {"beats": (mine,)}),
        ("far", ("running", ""), {"beats": (elsewhere,)}),
        ("old", ("unknown", "no heartbeats"), {"beats": ()}),
    ):
        assert state(make_run(tmp_path / name, **options)) == wanted, name


def test_a_node_out_of_reach_is_not_said_to_live_for_ever(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", beats=(dataclasses.replace(GONE, host="node-7"),))
    past = time.time() - 3600
    os.utime(heartbeat.path_of(run / "heartbeats", 0), (past, past))
    name, why = state(run)
    assert name == "unknown" and "rank 0 on node-7 is silent for 3600 s" in why


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder of a file system whose locks /proc/locks shows; overlayfs, for one, hides them."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_run_that_only_holds_its_lock_is_running_and_looking_takes_no_lock(
    in_memory: Path,
) -> None:
    run = make_run(in_memory / "run")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state(run) == ("running", "")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert state(run) == ("stopped", "")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[1]", "config.json: holds no JSON object"),
        ("config.json", None, "config.json is missing"),
        ("metrics.jsonl", b"\x00\xff\nno\n", "metrics.jsonl: its last lines are no records"),
        ("checkpoints/latest.json", b'{"step": 5}', "names no checkpoint that is there"),
        ("checkpoints/latest.json", b"", "checkpoints/latest.json: not JSON"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "hurt")
    make_run(tmp_path / "runs" / "well")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("hurt"))
    assert "damaged" in line and why in line
    assert "well" in shown and "Traceback" not in shown


def test_what_is_no_file_is_damage_and_nothing_waits_for_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    name, why = state(run)
    assert name == "damaged" and why.startswith("metrics.jsonl: not a regular file; put ")


def test_a_pipe_among_the_heartbeats_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "heartbeats" / "rank-00000.json").unlink()
    os.mkfifo(run / "heartbeats" / "rank-00000.json")
    assert state(run) == ("unknown", "no heartbeats")


def test_a_number_of_ranks_that_nobody_has_costs_no_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run"]["world_size"] = 1 << 62
    (run / "config.json").write_text(json.dumps(config))
    assert state(run) == ("stopped", "")


def test_values_of_odd_types_are_no_traceback(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", loss="low", images_per_second=None, step=8)
    facts = {"recipe": 7, "run": {"total_steps": "many", "steps_per_epoch": [], "world_size": {}}}
    (run / "config.json").write_text(json.dumps(facts))
    (found,) = list_runs([tmp_path])
    assert (found.recipe, found.total_steps, found.loss, found.ranks) == (None, None, None, 1)


def test_torn_and_long_files_are_read_from_their_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step=4000, total=5000, saved=4000)
    size = (run / "metrics.jsonl").stat().st_size
    assert size > 3 * (1 << 16)  # several blocks; the kNN result is in the first one
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4001, "lo')
    (found,) = list_runs([run])
    assert (found.name, found.step, found.knn_top1) == ("run", 4000, 0.5)


@pytest.mark.parametrize("length", [0, 1, 30, 1 << 16, (1 << 16) + 1])
@pytest.mark.parametrize("end", ["\n", "\ntorn", ""])
def test_lines_come_whole_whatever_the_blocks_they_lie_in(
    length: int, end: str, tmp_path: Path
) -> None:
    lines = [f"{n} {'x' * (n * length // 7)}" for n in range(12)]
    path = tmp_path / "lines"
    path.write_text("\n".join(lines) + end)
    with path.open("rb") as file:
        found = [line.decode() for line in _lines_from_the_end(file)]
    assert found == lines[::-1][0 if end else 1 :]


def test_an_export_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "export").mkdir()
    for name in ("config.json", "widebatch.json"):  # as --format huggingface writes them
        (tmp_path / "export" / name).write_text("{}")
    assert [run.name for run in list_runs([tmp_path])] == ["run"]


def test_heartbeats_of_an_older_version_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", beats=(dataclasses.replace(GONE, ended="KeyError"),))
    path = heartbeat.path_of(run / "heartbeats", 0)
    saved = json.loads(path.read_text())
    del saved["why"]
    path.write_text(json.dumps(saved))
    assert state(run) == ("failed", "KeyError on rank 0 at step 7")


def test_a_run_before_its_first_step_is_listed(tmp_path: Path) -> None:
    (tmp_path / "new" / "heartbeats").mkdir(parents=True)
    (tmp_path / "new" / ".lock").touch()
    assert state(tmp_path) == ("unknown", "no heartbeats")


def test_the_newest_comes_first_and_json_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for age, name in ((30, "b"), (10, "a"), (20, "group/c")):
        run = make_run(tmp_path / name, loss=float("nan"))
        past = time.time() - age
        os.utime(run / "metrics.jsonl", (past, past))
    assert main(["runs", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found] == ["a", "group/c", "b"]
    assert set(found[0]) == {field.name for field in dataclasses.fields(RunFacts)}
    assert found[0]["loss"] is None


def test_a_folder_that_is_not_there_and_one_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().err


def test_a_table_has_the_columns_that_say_something() -> None:
    row = {"run": "a-run", "recipe": "", "state": "failed", "step": "100/200", "why": "an error"}
    assert table([row, row | {"run": "b", "step": "1/200"}]) == [
        "run    state      step  why",
        "a-run  failed  100/200  an error",
        "b      failed    1/200  an error",
    ]


def test_names_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "evil\x1b[2J\nname")
    assert main(["runs", str(tmp_path)]) == 0
    assert r"evil\x1b[2J\x0aname" in capsys.readouterr().out


def test_hundreds_of_runs_are_listed_without_torch(tmp_path: Path) -> None:
    for index in range(200):
        make_run(tmp_path / f"run-{index}")
    code = (
        "import sys; from launch.__main__ import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning_fabric', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 201
