"""The folder of a run: who may write it, and which checkpoint in it to go on from."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from data_pipeline.beton import sha256_of
from data_pipeline.errors import DataError
from data_pipeline.strict_json import read_json_file
from trainer.checkpoint import Checkpoint, CheckpointStore
from trainer.config import RunConfig, completed, differences, from_json, to_json
from trainer.distributed import broadcast_json
from trainer.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524})
"""What ``flock`` fails with where the file system has none: NFS without its lock service, Lustre
without the option. 524 is the kernel's own ENOTSUPP, which some let out."""


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the run's folder: two runs that write one folder would ruin both.

    A run that is refused before its first step leaves no folder behind, nor anything in one.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: {out} exists and is no folder; choose another name")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {out}: another process is training there; stop it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "--out %s: no file locks there (%s): nothing stops a second run from writing"
                " to the same folder; give each run its own",
                out,
                error.strerror,
            )
        if not os.fstat(descriptor).st_nlink:
            raise ConfigError(f"--out {out}: another process has just left it; start again")
        try:
            yield
        finally:
            if not (out / "config.json").exists():
                _clear(out, made)
    finally:
        os.close(descriptor)


def _clear(out: Path, made: list[Path]) -> None:
    """Remove what a run leaves that did not begin, while its lock is held."""
    (out / ".lock").unlink(missing_ok=True)
    for name in ("heartbeats", "stacks"):
        shutil.rmtree(out / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        for folder in made:
            folder.rmdir()


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
        saved = read_json_file(path)
    except DataError as error:
        raise ConfigError(str(error)) from None
    saved.pop("run", None)
    changed = differences(completed(saved), to_json(config))
    if changed:
        try:
            from_json(RunConfig, saved, f"{path}: config")
        except ConfigError as error:  # what cannot be read says more than what differs for it
            raise ConfigError(
                f"{error}; mend it, or --resume force to go on with the new settings"
            ) from None
        raise ConfigError(
            f"--out {config.out}: holds a run with other settings ({'; '.join(changed)});"
            " choose another folder, or --resume force to go on with the new ones"
        )


def _check_same_data(config: RunConfig, found: Checkpoint, fingerprint: str) -> None:
    """Without reading a terabyte at every start: only when the file may have changed."""
    if config.resume == "force":
        return
    path = config.data.train
    saved = found.state.get("data_fingerprint")
    if saved != fingerprint:
        raise ConfigError(
            f"{path}: is not the data that {found.path} was trained on (fingerprint"
            f" {fingerprint[:12]}, then {str(saved)[:12]}); --resume force goes on with it anyway"
        )
    if found.state.get("data_stamp") == data_stamp(path):
        return
    log.info("%s: written to since the checkpoint, or another copy; checking its content", path)
    with path.open("rb") as file:  # the fingerprint may be the manifest's word for other bytes
        content = sha256_of(file)
    if content != saved:
        raise ConfigError(
            f"{path}: its content has changed since {found.path} was trained on it (SHA-256"
            f" {content[:12]}, then {str(saved)[:12]}); copy it again, or --resume force goes on"
            " with it anyway"
        )


def data_stamp(path: Path) -> list[int]:
    """Bytes, and time of the last change in ns: what says without reading a file that it is as it
    was. A copy that keeps times (``cp -p``, ``rsync -t``) keeps it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
