"""Checkpoints: atomic, checksummed, resumable at any world size.

Layout of ``RUN/checkpoints``::

    step-00000040/model.safetensors       parameters and buffers, by name
                  optimizer.safetensors   "parameter name::slot", e.g. momentum buffers
                  state.json              step, data fingerprint, counters: everything else
                  manifest.json           SHA-256 and size of each file; written last
    latest.json, best.json                {"step": 40}; replaced atomically

A checkpoint is written under a temporary name in the same directory, flushed to disk, and renamed:
it exists completely or not at all. Reading checks every file against the manifest and falls back to
the checkpoint before. One rank writes whole tensors, so nothing in a file depends on the number of
ranks, nor on the strategy that shares tensors out between them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from trainer.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"
_FORMAT = 1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how much to keep. A stopped or finished run always saves."""

    every_epochs: int = 1
    """Save after every so many epochs; 0: not at epochs' ends."""
    every_steps: int = 0
    """Save after every so many optimizer steps too; 0: not by steps."""
    keep: int = 2
    """Newest checkpoints to keep, at least 2 so that a damaged one has a predecessor; the one with
    the best online kNN is kept besides."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk whose files match its manifest."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return int(self.state["step"])

    def tensors(self, part: str) -> Tensors:
        """Tensors of ``part`` (``model`` or ``optimizer``) on the CPU."""
        return safetensors.torch.load_file(self.path / f"{part}.safetensors")


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = max(2, keep)

    def save(self, state: Mapping[str, Any], parts: Mapping[str, Tensors]) -> Path:
        """Write one checkpoint for ``state["step"]``, then point ``latest.json`` at it.

        Args:
            state: JSON values; must hold ``step``.
            parts: file stem to tensors, any device and layout.

        Raises:
            OSError: it could not be written; earlier checkpoints and the pointer are untouched and
                nothing of the new one is left.
        """
        step = int(state["step"])
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        if final.exists():
            if self._is_whole(step):
                return final  # saved already: a resumed run that was stopped before its first step
            shutil.rmtree(final)
        try:
            temporary.mkdir(mode=0o700)
            files = {f"{part}.safetensors": _serialise(tensors) for part, tensors in parts.items()}
            files[STATE] = _json_bytes({"format": _FORMAT, **state})
            manifest = {
                "format": _FORMAT,
                "files": {
                    name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                    for name, data in files.items()
                },
            }
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _write_synced(temporary / MANIFEST, _json_bytes(manifest))
            _sync_directory(temporary)
            temporary.rename(final)
            _sync_directory(self.directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._point("latest", step)
        self._retire()
        return final

    def mark_best(self, step: int, **facts: Any) -> None:
        """Point ``best.json`` at a saved step, which retention then keeps."""
        self._point("best", step, **facts)
        self._retire()

    def best_step(self) -> int | None:
        """The step that :meth:`mark_best` named last."""
        return self._pointed("best")

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are whole; ``None`` in a folder without any.

        Raises:
            CheckpointError: there are checkpoints or traces of them, but none is whole. A run never
                starts afresh over a damaged past.
        """
        steps = sorted(self._steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                found = self.read(step)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("%s; trying the checkpoint before it", error)
                continue
            pointed = self._pointed("latest")
            if pointed is not None and pointed > found.step and pointed not in steps:
                log.warning("checkpoint of step %d is gone; going on from %d", pointed, found.step)
            return found
        if problems or self._pointed("latest") is not None:
            first = problems[0] if problems else f"{self.directory}: the checkpoints are gone"
            raise CheckpointError(
                f"{first}; no whole checkpoint is left: restore one, or start in another folder"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Check and open the checkpoint of ``step``.

        Raises:
            CheckpointError: a file is missing, cut, changed or unreadable; names the file.
        """
        path = self.directory / f"step-{step:08d}"
        manifest = _read_json(path / MANIFEST)
        if manifest.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path / MANIFEST}: format {manifest.get('format')!r}, not {_FORMAT}"
            )
        files = manifest.get("files")
        if not isinstance(files, dict) or STATE not in files:
            raise CheckpointError(f"{path / MANIFEST}: lists no {STATE}")
        for name, facts in files.items():
            _check_file(path, name, facts)
        state = _read_json(path / STATE)
        if state.get("step") != step:
            raise CheckpointError(f"{path / STATE}: is of step {state.get('step')!r}")
        return Checkpoint(path, state)

    def _is_whole(self, step: int) -> bool:
        try:
            self.read(step)
        except CheckpointError as error:
            log.warning("%s; writing it again", error)
            return False
        return True

    def _sweep(self) -> None:
        """Remove what a process that was killed while writing left behind."""
        for leftover in self.directory.glob(f"{_TEMPORARY}*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        matches = (_STEP_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return [int(match[1]) for match in matches if match]

    def _point(self, name: str, step: int, **facts: Any) -> None:
        path = self.directory / f"{name}.json"
        temporary = self.directory / f"{_TEMPORARY}{name}.json"
        _write_synced(temporary, _json_bytes({"step": step, **facts}))
        temporary.replace(path)
        _sync_directory(self.directory)

    def _pointed(self, name: str) -> int | None:
        path = self.directory / f"{name}.json"
        if not path.exists():
            return None
        step = _read_json(path).get("step")
        if not isinstance(step, int):
            raise CheckpointError(f"{path}: names no step; delete it to use the newest checkpoint")
        return step

    def _retire(self) -> None:
        """Delete old checkpoints; only whole ones count towards those that are kept."""
        whole = [s for s in self._steps() if (self._path(s) / MANIFEST).exists()]
        kept = {*sorted(whole, reverse=True)[: self.keep], self._pointed("best")}
        for step in whole:
            if step not in kept:
                shutil.rmtree(self._path(step))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"


def load_encoder_state(run: Path, best: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """The encoder's weights of a run, by torchvision's keys, and the run's ``config.json``.

    Args:
        run: the run's folder.
        best: the checkpoint with the best online kNN instead of the newest.

    Returns:
        The encoder's parameters and buffers without prefix, and the configuration, to which key
        ``checkpoint`` adds the state that was saved with the weights (step, epoch, fingerprint).

    Raises:
        CheckpointError: the folder holds no run, no whole checkpoint, or no best one.
    """
    config_path = run / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{run}: no config.json; is this the folder of a run?")
    config = _read_json(config_path)
    store = CheckpointStore(run / "checkpoints")
    if best:
        step = store.best_step()
        if step is None:
            raise CheckpointError(
                f"{run}: no best checkpoint; the online kNN never ran (--data.test)"
            )
        checkpoint: Checkpoint | None = store.read(step)
    else:
        checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError(f"{run}: no checkpoint yet; wait for the first, or stop the run once")
    prefix = "encoder."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in checkpoint.tensors("model").items()
        if name.startswith(prefix)
    }
    return tensors, {**config, "checkpoint": checkpoint.state}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's per-parameter state as flat ``name::slot`` tensors."""
    return {
        f"{name}::{slot}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Tensors) -> None:
    """Put :func:`optimizer_tensors` back, onto each parameter's device.

    Raises:
        CheckpointError: a name in ``saved`` is no parameter of ``model``.
    """
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, slot = split_key(key, parameters)
        parameter = parameters[name]
        placed = value.to(parameter.device)  # counts of steps too: fused kernels read them there
        if placed.shape == parameter.shape:  # keep the memory layout of a fresh run: same sums
            placed = torch.empty_like(parameter, dtype=value.dtype).copy_(placed)
        optimizer.state[parameter][slot] = placed


def split_key(key: str, parameters: Container[str]) -> tuple[str, str]:
    """Parameter and slot of a key of :func:`optimizer_tensors`.

    Raises:
        CheckpointError: it names none of ``parameters``.
    """
    name, _, slot = key.rpartition("::")
    if name not in parameters:
        raise CheckpointError(f"optimizer.safetensors: {name!r} is no parameter of this model")
    return name, slot


def _serialise(tensors: Tensors) -> bytes:
    contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    data: bytes = safetensors.torch.save(contiguous)
    return data


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return values


def _check_file(directory: Path, name: str, facts: Any) -> None:
    path = directory / name
    if Path(name).name != name or not isinstance(facts, dict):
        raise CheckpointError(f"{directory / MANIFEST}: bad entry {name!r}")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing or not a plain file")
    size = path.stat().st_size
    if size != facts.get("bytes"):
        raise CheckpointError(f"{path}: {size} bytes, its manifest says {facts.get('bytes')}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != facts.get("sha256"):
        raise CheckpointError(f"{path}: its content does not match its checksum")
