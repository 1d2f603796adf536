"""The folder of a run: who may write it, and which checkpoint in it to go on from."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from trainer.checkpoint import Checkpoint, CheckpointStore
from trainer.config import RunConfig, completed, differences, to_json
from trainer.distributed import broadcast_json
from trainer.errors import CheckpointError, ConfigError


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs that write one folder would ruin both."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: exists and is no folder")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {out}: another process is training there; stop it or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def agreed_checkpoint(
    config: RunConfig, fabric: Fabric, store: CheckpointStore, fingerprint: str
) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 decides for all, so that no rank starts elsewhere."""
    verdict: dict[str, Any] = {}
    if fabric.is_global_zero:
        try:
            _check_same_run(config)
            found = store.newest()
            if found is not None:
                _check_same_data(config, found, fingerprint)
                _check_may_resume(config)
            verdict = {"step": found.step if found else None}
        except CheckpointError as error:
            verdict = {"checkpoint_error": str(error)}
        except ConfigError as error:
            verdict = {"config_error": str(error)}
    verdict = broadcast_json(verdict)
    if "checkpoint_error" in verdict:
        raise CheckpointError(verdict["checkpoint_error"])
    if "config_error" in verdict:
        raise ConfigError(verdict["config_error"])
    return None if verdict["step"] is None else store.read(verdict["step"])


def _check_may_resume(config: RunConfig) -> None:
    if config.resume == "never":
        raise ConfigError(
            f"--out {config.out}: holds a run already and --resume never is set;"
            " choose another folder or leave --resume out"
        )


def _check_same_run(config: RunConfig) -> None:
    path = config.out / "config.json"
    if config.resume == "force" or not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: unreadable ({error}); delete it to go on") from None
    saved.pop("run", None)
    changed = differences(completed(saved), to_json(config))
    if changed:
        raise ConfigError(
            f"--out {config.out}: holds a run with other settings ({'; '.join(changed)});"
            " choose another folder, or --resume force to go on with the new ones"
        )


def _check_same_data(config: RunConfig, found: Checkpoint, fingerprint: str) -> None:
    saved = found.state.get("data_fingerprint")
    if saved != fingerprint and config.resume != "force":
        raise ConfigError(
            f"{config.data.train}: is not the data that {found.path} was trained on (fingerprint"
            f" {fingerprint[:12]}, then {str(saved)[:12]}); --resume force goes on with it anyway"
        )
