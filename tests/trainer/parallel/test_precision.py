"""`--precision auto` is what the processors are made for; a run keeps what it was begun with."""

import json
import logging
from pathlib import Path

import pytest
import torch

from tests.dist import run_ranks
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig
from trainer.loop import fit
from trainer.parallel import machine
from trainer.parallel.machine import has_bf16, settled, with_precision
from trainer.parallel.strategy import launch_fabric
from trainer.recipes import RECIPES


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """oneDNN is held to nothing."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("capabilities", "has", "why"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False, "no bf16"),
        ({"avx512_bf16": True}, True, "avx512_bf16"),
        ({"amx_bf16": True, "avx512_bf16": True}, True, "amx_bf16"),
        ({"neon": True, "bf16": True}, True, "has bf16"),
    ],
    ids=str,
)
def test_a_processor_is_asked_for_its_bf16(
    free: pytest.MonkeyPatch, capabilities: dict[str, bool], has: bool, why: str
) -> None:
    free.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16("cpu")[0] is has
    assert why in has_bf16("cpu")[1]
    config = RECIPES["simclr-r50"]()
    assert config.precision == "auto"
    assert with_precision(config, "cpu").precision == ("bf16" if has else "fp32")


@pytest.mark.parametrize(
    ("name", "cap", "has"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", False),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE_VNNI", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
    ],
)
def test_a_library_that_is_held_to_less_has_less(
    free: pytest.MonkeyPatch, name: str, cap: str, has: bool
) -> None:
    free.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    free.setenv(name, cap)
    assert has_bf16("cpu")[0] is has
    assert has or name in has_bf16("cpu")[1]


def test_what_is_asked_for_is_taken(free: pytest.MonkeyPatch) -> None:
    free.setattr(torch.cpu, "get_capabilities", dict)
    config = tiny_config(Path("x.beton"), Path("x"), precision="bf16")
    assert with_precision(config, "cpu") is config


def _settled_on_a_rank(rank: int, world_size: int, out: str) -> list[object]:
    machine.has_bf16 = lambda device_type: (rank == 0, "so says the test")
    fabric = launch_fabric("cpu", "auto")
    config = settled(tiny_config(Path("x.beton"), Path(out), precision="auto"), fabric)
    with fabric.autocast():
        return [config.precision, torch.is_autocast_enabled("cpu")]


def test_processes_on_different_processors_take_the_first_ones(tmp_path: Path) -> None:
    found = run_ranks(
        _settled_on_a_rank, 2, str(tmp_path / "new"), timeout=240, init_process_group=False
    )
    assert found == [["bf16", True]] * 2


def test_a_run_says_what_it_chose_and_keeps_it(
    tmp_path: Path, free: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def saved() -> str:
        return str(json.loads((tmp_path / "run" / "config.json").read_text())["precision"])

    def config(**changes: object) -> RunConfig:
        return tiny_config(data, tmp_path / "run", encoder=SMALL_ENCODER, steps=2, **changes)

    data = pack_images(tmp_path, count=48)
    calls = iter([True, False])
    free.setattr(machine, "has_bf16", lambda device_type: (False, "so says the test"))
    with caplog.at_level(logging.INFO):
        fit(config(precision="auto"), lambda: next(calls))
        assert saved() == "fp32"
        assert "precision fp32: so says the test" in caplog.text
        free.setattr(machine, "has_bf16", lambda device_type: (True, "so says the test"))
        fit(config(precision="auto"))
    assert saved() == "fp32"
    assert "precision fp32: as the run began" in caplog.text


def test_bf16_where_it_is_slow_is_taken_with_a_warning(
    tmp_path: Path, free: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free.setattr(machine, "has_bf16", lambda device_type: (False, "so says the test"))
    config = tiny_config(tmp_path / "x.beton", tmp_path / "x", precision="bf16")
    assert settled(config, launch_fabric("cpu", "bf16")).precision == "bf16"
    assert "--precision bf16: so says the test" in caplog.text
