"""A device whose memory does not suffice: the user hears what to change, not torch's statistics."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from tests.trainer.faulty import small_config
from tests.trainer.runs import pack_images
from trainer import loop

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
CPU = (
    "[enforce] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


@pytest.mark.parametrize(("micro_batch", "remedy"), [(0, "Take --micro-batch"), (8, "below 8")])
@pytest.mark.parametrize(
    ("error_class", "said"), [(torch.OutOfMemoryError, CUDA), (RuntimeError, CPU)]
)
def test_too_little_memory_ends_in_its_figures_and_what_to_change(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int,
    remedy: str,
    error_class: type[RuntimeError],
    said: str,
) -> None:
    def full(*_: Any) -> None:
        raise error_class(said)

    monkeypatch.setattr(loop, "apply_update", full)
    config = small_config(pack_images(tmp_path, count=24), tmp_path / "run")
    config = dataclasses.replace(config, micro_batch=micro_batch)
    with pytest.raises(ConfigError, match=remedy) as error:
        loop.fit(config)
    assert any(f"{figure}. Take" in str(error.value) for figure in ("2.00 GiB", "9 bytes"))
    assert f"--batch {config.batch}" in str(error.value)
