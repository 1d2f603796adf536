"""The checkpoints of one run on disk: written whole or not at all, checked, retired."""

import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import fault_injection
from common.errors import CheckpointError, DataError
from common.files.safetensors_file import load_safetensors
from trainer.state.checkpoint.files import (
    MANIFEST,
    STATE,
    Tensors,
    check_file,
    read_json,
    read_manifest,
    sync_directory,
    write_json,
    write_manifest,
    write_tensors,
)

log = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step-([0-9]{8,18})")
_TEMPORARY = ".writing-"
_NOT_KEPT = "it does not count as a checkpoint to keep"


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
        """Tensors of ``part`` (``model`` or ``optimizer``) on the CPU.

        Raises:
            CheckpointError: the file is gone or no sound file of tensors; names it.
        """
        try:
            return load_safetensors(self.path / f"{part}.safetensors")
        except DataError as error:
            raise CheckpointError(str(error)) from None


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep
        self._proven: set[int] = set()
        """Steps that this process wrote, or read and found whole."""

    def save(self, state: Mapping[str, Any], parts: Mapping[str, Tensors]) -> Path:
        """Write one checkpoint for ``state["step"]``, then point ``latest.json`` at it.

        Args:
            state: JSON values; must hold ``step``.
            parts: file stem to tensors, any device and layout.

        Raises:
            OSError: it could not be written; names the file. Earlier checkpoints and the pointer
                are untouched and nothing of the new one is left, unless only the pointer failed.
        """
        step = int(state["step"])
        final = self._path(step)
        self._make_directory()
        self._sweep()
        if final.exists() or final.is_symlink():
            if self._is_whole(step, otherwise="writing it again"):
                return final  # saved already: a resumed run that was stopped before its first step
            self._delete(step)
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        try:
            fault_injection.at("checkpoint.folder")
            temporary.mkdir(mode=0o700)
            files = {}
            for part, tensors in parts.items():
                name = f"{part}.safetensors"
                files[name] = write_tensors(temporary / name, tensors)
            files[STATE] = write_json(temporary / STATE, state)
            fault_injection.at("checkpoint.manifest")
            write_manifest(temporary / MANIFEST, files)
            sync_directory(temporary)
            fault_injection.at("checkpoint.rename")
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._proven.add(step)
        fault_injection.at("checkpoint.renamed")
        sync_directory(self.directory)
        self._point("latest", step)
        self._retire()
        return final

    def mark_best(self, step: int, **facts: Any) -> None:
        """Point ``best.json`` at a saved step, which retention then keeps.

        Raises:
            OSError: the pointer could not be written; names it. The one before stands.
        """
        self._point("best", step, **facts)
        self._retire()

    def best_step(self) -> int | None:
        """The step that :meth:`mark_best` named last.

        Raises:
            CheckpointError: ``best.json`` is damaged.
        """
        return self._pointed("best")

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are whole; ``None`` in a folder without any.

        Raises:
            CheckpointError: there are checkpoints or traces of them, but none is whole. A run never
                starts afresh over a damaged past.
        """
        steps = sorted(self._steps(), reverse=True)
        problems = []
        pointed = None
        try:
            pointed = self._pointed("latest")
        except CheckpointError as error:
            problems.append(str(error))  # the folders say which is the newest, too
            log.warning("%s; looking at the checkpoints themselves", error)
        for step in steps:
            try:
                found = self.read(step)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("%s; trying the checkpoint before it", error)
                continue
            if pointed is not None and pointed > found.step and pointed not in steps:
                log.warning("checkpoint of step %d is gone; going on from %d", pointed, found.step)
            return found
        if problems or pointed is not None:
            first = problems[-1] if problems else f"{self.directory}: the checkpoints are gone"
            raise CheckpointError(
                f"{first}; no whole checkpoint is left: restore one, or start in another folder"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Check and open the checkpoint of ``step``.

        Raises:
            CheckpointError: a file is missing, cut, changed or unreadable; names the file.
        """
        path = self._path(step)
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link, not a checkpoint's own folder")
        for name, facts in read_manifest(path / MANIFEST).items():
            check_file(path, name, facts)
        state = read_json(path / STATE)
        if state.get("step") != step:
            raise CheckpointError(f"{path / STATE}: is of step {state.get('step')!r}")
        self._proven.add(step)
        return Checkpoint(path, state)

    def _is_whole(self, step: int, otherwise: str) -> bool:
        """Read it; says what is wrong, and what happens then."""
        try:
            self.read(step)
        except CheckpointError as error:
            log.warning("%s; %s", error, otherwise)
            return False
        return True

    def _make_directory(self) -> None:
        if not self.directory.is_dir():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(self.directory.parent)

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
        steps = (int(match[1]) for match in matches if match)
        return [step for step in steps if self._path(step).exists()]

    def _point(self, name: str, step: int, **facts: Any) -> None:
        path = self.directory / f"{name}.json"
        temporary = self.directory / f"{_TEMPORARY}{name}.json"
        try:
            write_json(temporary, {"step": step, **facts})
            fault_injection.at("checkpoint.point")
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        sync_directory(self.directory)

    def _pointed(self, name: str) -> int | None:
        path = self.directory / f"{name}.json"
        if not path.exists():
            return None
        step = read_json(path).get("step")
        if not isinstance(step, int):
            raise CheckpointError(f"{path}: names no step; delete it to use the newest checkpoint")
        return step

    def _retire(self) -> None:
        """Delete what is older than the newest ``keep`` whole checkpoints, except the best.

        A damaged checkpoint never counts as one that is kept. Whatever goes wrong here costs disk
        space and nothing else, so it is said and the run goes on.
        """
        try:
            best = self._pointed("best")
            whole: list[int] = []
            for step in sorted(self._steps(), reverse=True):
                if len(whole) < self.keep:
                    if step in self._proven or self._is_whole(step, _NOT_KEPT):
                        whole.append(step)
                elif step != best:
                    fault_injection.at("checkpoint.retire")
                    self._delete(step)
        except (CheckpointError, OSError) as error:
            log.warning("old checkpoints are not deleted: %s", error)

    def _delete(self, step: int) -> None:
        """In one step under its own name: no half of a checkpoint is ever seen."""
        path = self._path(step)
        self._proven.discard(step)
        if path.is_symlink():
            path.unlink()
            return
        doomed = path.with_name(f"{_TEMPORARY}deleted-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"
