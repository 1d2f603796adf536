"""Saving behind the steps: what training waits for, and what a failed save does to a run."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common import fault_injection
from launch.exit_codes import ExitCode, exit_code_for
from tests.dist import run_ranks
from tests.faults import parse
from trainer.state.checkpoint import CheckpointConfig, CheckpointSaver, CheckpointStore, Tensors
from trainer.state.checkpoint.saver import HostCopy


class SlowStore(CheckpointStore):
    """Writes when it is let."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.may_write = threading.Event()
        self.writing = 0
        self.most_at_once = 0

    def save(self, *args: Any, **kwargs: Any) -> Path:
        self.writing += 1
        self.most_at_once = max(self.most_at_once, self.writing)
        assert self.may_write.wait(60)
        try:
            return super().save(*args, **kwargs)
        finally:
            self.writing -= 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    store = SlowStore(tmp_path / "checkpoints")
    yield store
    fault_injection.arm([])
    store.may_write.set()


def make_saver(store: CheckpointStore, **settings: Any) -> CheckpointSaver:
    return CheckpointSaver(store, CheckpointConfig(**settings), is_writer=True)


def parts(value: float) -> dict[str, Tensors]:
    return {"model": {"w": torch.full((3, 4), value)}, "optimizer": {"w::m": torch.tensor(value)}}


def test_a_save_returns_before_it_is_written_and_keeps_what_the_tensors_were(
    store: SlowStore,
) -> None:
    saver = make_saver(store)
    tensors = parts(1.0)
    state = {"step": 1, "counter": 1}
    saver.save(state, tensors)
    assert store.newest() is None
    tensors["model"]["w"].fill_(2.0)  # the next step
    tensors["optimizer"]["w::m"].fill_(2.0)
    state["counter"] = 2
    store.may_write.set()
    saver.finish()
    found = store.newest()
    assert found is not None
    assert found.state["counter"] == 1
    assert found.tensors("model")["w"].eq(1.0).all()
    assert found.tensors("optimizer")["w::m"] == 1.0
    saver.close()


def test_a_synchronous_save_returns_when_it_is_written(store: SlowStore) -> None:
    store.may_write.set()
    saver = make_saver(store, asynchronous=False)
    saver.save({"step": 1}, parts(1.0))
    assert store.newest() is not None
    saver.close()


def test_the_next_save_waits_for_the_one_under_way(store: SlowStore) -> None:
    saver = make_saver(store)
    saver.save({"step": 1}, parts(1.0))
    threading.Timer(0.3, store.may_write.set).start()
    saver.save({"step": 2}, parts(2.0))  # its copy must not overwrite that of step 1
    saver.finish()
    assert store.most_at_once == 1
    for step in (1, 2):
        assert store.read(step).tensors("model")["w"].eq(step).all()
    saver.close()


def test_the_best_is_marked_after_it_is_written(store: SlowStore) -> None:
    saver = make_saver(store)
    saver.save({"step": 1}, parts(1.0), best={"knn_top1": 0.5})
    assert store.best_step() is None
    store.may_write.set()
    saver.finish()
    assert store.best_step() == 1
    saver.close()


def test_closing_waits_for_the_save_under_way(store: SlowStore) -> None:
    """An error in training must not cost the checkpoint that is being written."""
    saver = make_saver(store)
    saver.save({"step": 1}, parts(1.0))
    threading.Timer(0.3, store.may_write.set).start()
    saver.close()
    assert store.newest() is not None


def test_a_rank_that_does_not_write_writes_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    saver = CheckpointSaver(store, CheckpointConfig(), is_writer=False)
    saver.save({"step": 1}, {})
    saver.finish()
    saver.close()
    assert not store.directory.exists()


@pytest.mark.reliability(6)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_named_and_forgotten_after_the_next_that_works(
    store: SlowStore, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store.may_write.set()
    saver = make_saver(store, asynchronous=asynchronous, max_failures=2)
    saver.save({"step": 1}, parts(1.0))
    for step in (2, 4):
        _wait(saver)
        fault_injection.arm(parse("checkpoint.sync raise:ENOSPC"))
        saver.save({"step": step}, parts(2.0))
        _wait(saver)
        assert saver.failure() == 0  # one failure ends nothing
        assert f"checkpoint of step {step} could not be written" in caplog.text
        assert "No space left on device" in caplog.text
        assert "model.safetensors" in caplog.text
        assert not list(store.directory.glob(".writing-*"))
        fault_injection.arm([])
        saver.save({"step": step + 1}, parts(3.0))
        _wait(saver)
        assert saver.failure() == 0
    saver.finish()
    saver.close()
    newest = store.newest()
    assert newest is not None
    assert newest.step == 5


def _wait(saver: CheckpointSaver) -> None:
    """Until the write under way is done, as time passes in a run."""
    if saver._under_way is not None:
        saver._under_way[1].exception(timeout=60)
    saver.failure()


@pytest.mark.reliability(6)
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT"])
def test_failures_in_a_row_end_the_run_as_retryable(store: SlowStore, name: str) -> None:
    store.may_write.set()
    saver = make_saver(store, max_failures=3)
    fault_injection.arm(parse(f"checkpoint.manifest pass=1+ raise:{name}"))
    for step in (1, 2, 3):
        saver.raise_if_failing(saver.failure())
        saver.save({"step": step}, parts(step))
        _wait(saver)
    with pytest.raises(OSError, match="fault injected") as caught:
        saver.raise_if_failing(saver.failure())
    assert caught.value.errno == getattr(errno, name)
    assert exit_code_for(caught.value) == ExitCode.RETRYABLE
    saver.close()
    other = CheckpointSaver(CheckpointStore(store.directory), CheckpointConfig(), is_writer=False)
    with pytest.raises(OSError, match="rank 0 could not write 3 checkpoints in a row") as caught:
        other.raise_if_failing(getattr(errno, name))
    assert exit_code_for(caught.value) == ExitCode.RETRYABLE
    other.close()


def test_an_error_that_is_not_the_disks_ends_the_run_at_once(store: SlowStore) -> None:
    store.may_write.set()
    saver = make_saver(store)
    saver.save({"step": 1}, {"model": {"w": torch.ones(1, dtype=torch.complex64)}})
    with pytest.raises(TypeError, match="complex64"):
        _wait(saver)
    saver.close()


def _finish_with_a_full_disk(rank: int, world_size: int, folder: str) -> list[Any]:
    fault_injection.arm(parse("checkpoint.write raise:ENOSPC"))
    saver = CheckpointSaver(CheckpointStore(Path(folder)), CheckpointConfig(), rank == 0)
    saver.save({"step": 1}, parts(1.0))
    try:
        saver.finish()
    except OSError as error:
        return [error.errno, int(exit_code_for(error)), str(error)]
    finally:
        saver.close()
    return []


@pytest.mark.reliability(6)
def test_all_ranks_hear_that_the_last_save_failed(tmp_path: Path) -> None:
    """A run that ends must not say that it is saved when it is not."""
    results = run_ranks(_finish_with_a_full_disk, 2, str(tmp_path / "checkpoints"))
    for number, code, text in results:
        assert (number, code) == (errno.ENOSPC, ExitCode.RETRYABLE)
        assert "model.safetensors" in text


def test_host_memory_is_used_again_and_layouts_are_kept() -> None:
    host = HostCopy()
    tensors: Tensors = {
        "conv": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0),
        "sliced": torch.randn(6, 8)[:, ::2],
        "expanded": torch.ones(1).expand(5),
    }
    pointers = []
    for change in (0, 1):
        tensors = {name: tensor + change for name, tensor in tensors.items()}
        copies = host.take({"model": tensors, "optimizer": {"conv": tensors["conv"] * 2}})
        host.wait()
        for name, tensor in tensors.items():
            assert torch.equal(copies["model"][name], tensor), name
        assert torch.equal(copies["optimizer"]["conv"], tensors["conv"] * 2)
        assert copies["model"]["conv"].stride() == tensors["conv"].stride()
        pointers.append(copies["model"]["conv"].data_ptr())
    assert pointers[0] == pointers[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU: no CUDA device here")
def test_copies_from_a_gpu_are_queued_before_the_next_step_changes_the_tensors() -> None:
    host = HostCopy()
    weight = torch.ones(64 << 20, device="cuda")
    copies = host.take({"model": {"w": weight}})
    weight.fill_(2.0)
    host.wait()
    assert copies["model"]["w"].is_pinned()
    assert copies["model"]["w"].eq(1.0).all()
