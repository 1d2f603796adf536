"""The doctor finds what is wrong, names it, and finds nothing where nothing is wrong."""

import json
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from tests.dist import run_ranks
from tests.trainer.runs import pack_images
from trainer.doctor import proof
from trainer.doctor.data import data_file
from trainer.doctor.finding import Finding, examined, of_all_ranks, table
from trainer.doctor.folder import shared_folder
from trainer.doctor.network import bandwidth, clocks

CPU = torch.device("cpu")


def _prove(rank: int, world_size: int, broken: str) -> dict[str, str]:
    if broken == "loss":  # negatives without gradient: the classic bug, right value, wrong gradient
        right = proof.nt_xent
        proof.nt_xent = lambda z, t, **_: (right(z, t)[0] / world_size,)  # type: ignore[assignment]
    elif broken == "batch norm":
        proof.convert_sync_batch_norm = lambda layer: layer  # type: ignore[assignment]
    elif broken == "lars":
        proof._averaged = lambda gradient: gradient
    elif broken == "queue":
        proof.gather_rows = lambda rows: rows  # type: ignore[assignment]
    return {finding.check: finding.verdict for finding in proof.equal_runs(CPU)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_healthy_processes_prove_every_part(world_size: int) -> None:
    for verdicts in run_ranks(_prove, world_size, ""):
        assert verdicts == dict.fromkeys(("loss", "batch norm", "lars", "queue"), "good")


@pytest.mark.parametrize("part", ["loss", "batch norm", "lars", "queue"])
def test_the_part_that_differs_is_named(part: str) -> None:
    for verdicts in run_ranks(_prove, 2, part):
        bad = {name for name, verdict in verdicts.items() if verdict == "bad"}
        assert part in bad
        # The average is part of the proof of the loss too; nothing else may be accused.
        assert bad <= {part, "loss"}


def _network(rank: int, world_size: int, folders: list[str]) -> list[str]:
    found = [*bandwidth(CPU, node=rank), *clocks(CPU), *shared_folder(Path(folders[rank]))]
    return [f"{finding.verdict} {finding.check}" for finding in found]


@pytest.mark.slow
def test_a_shared_folder_is_told_from_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = run_ranks(_network, 2, [str(tmp_path)] * 2)
    assert all(
        said == ["good bandwidth", "good clocks", "good folder", said[3]] for said in shared
    ), shared
    assert not list(tmp_path.iterdir()), "leaves nothing behind"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    apart = run_ranks(_network, 2, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert "good folder" in apart[0]
    assert "bad folder" in apart[1]


def _merge(rank: int, world_size: int) -> str:
    mine = [Finding("same", "good", "as all"), Finding("own", "note", f"odd {rank % 2}")]
    return table(of_all_ranks(mine), world_size)


def test_equal_findings_stand_once_and_others_name_their_ranks() -> None:
    said = run_ranks(_merge, 3)[0].splitlines()
    assert [" ".join(line.split()) for line in said] == [
        "good same as all",
        "note own odd 0 [rank 0, 2]",
        "note own odd 1 [rank 1]",
    ]


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> list[Finding]:
        raise RuntimeError("no such\n thing")

    assert examined("name", check) == [
        Finding(
            "name",
            "bad",
            "RuntimeError: no such thing",
            "not foreseen: report it with this table",
        )
    ]


def test_a_damaged_file_is_bad(tmp_path: Path) -> None:
    file = pack_images(tmp_path, count=12)
    assert [finding.verdict for finding in data_file(file)] == ["good"]
    content = bytearray(file.read_bytes())
    content[-200] ^= 255
    file.write_bytes(content)
    (finding,) = examined("data", lambda: data_file(file))
    assert finding.verdict == "bad"
    assert str(file) in finding.said


def test_the_command_prints_and_writes_its_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pack_images(tmp_path, count=24)
    monkeypatch.setattr("trainer.doctor.data._SECONDS", 0.2)
    arguments = ["doctor", "--data", str(file), "--recipe", "digits-demo"]
    arguments += ["--out", str(tmp_path), "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "found.json").read_text())
    checks = {record["check"] for record in records}
    assert {"packages", "ffcv", "device", "folder", "loss", "queue", "data", "loader"} <= checks
    for check in checks:
        assert check in printed


def test_a_finding_is_printed_before_the_next_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []

    def look(device: torch.device) -> list[Finding]:
        printed.append(capsys.readouterr().out)
        return []

    monkeypatch.setattr(proof, "equal_runs", look)
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    assert "good  folder" in printed[0]
