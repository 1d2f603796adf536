"""The folder of a run: who may write it, and which checkpoint in it to go on from."""

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from common.collectives import broadcast_json
from common.errors import CheckpointError, ConfigError, DataError
from common.files.strict_json import read_json_file
from data_pipeline.reading.beton import name_of, sha256_of
from data_pipeline.reading.open_data import OpenData, joint_digest
from trainer.config import (
    RunConfig,
    RunPlan,
    absolute,
    completed,
    differences,
    from_json,
    lr_at,
    plan_run,
    to_json,
)
from trainer.state.checkpoint import Checkpoint, CheckpointStore

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
    config: RunConfig, plan: RunPlan, fabric: Fabric, store: CheckpointStore, data: OpenData
) -> Checkpoint | None:
    """The checkpoint to go on from; ``data`` knows its fingerprint then.

    Rank 0 decides for all, so that no rank starts elsewhere, and alone reads a file whose manifest
    does not say the fingerprint. What ``--resume force`` changes is said, setting by setting, and
    what it comes to.
    """
    verdict: dict[str, Any] = {}
    if fabric.is_global_zero:
        try:
            saved = _check_same_run(config)
            found = store.newest()
            fingerprint = _fingerprint(found, data)
            if found is not None:
                _check_same_data(config, found, fingerprint, hashed=not data.info.fingerprint)
                if config.resume == "never":
                    raise ConfigError(
                        f"--out {config.out}: holds a run already and --resume never is set;"
                        " choose another folder or leave --resume out"
                    )
                if config.resume == "force" and saved is not None:
                    _say_what_changes(saved, config, plan, found)
            verdict = {"step": found.step if found else None, "fingerprint": fingerprint}
        except (CheckpointError, ConfigError) as error:
            verdict = {"refused": str(error), "damaged": isinstance(error, CheckpointError)}
    verdict = broadcast_json(verdict)
    if "refused" in verdict:
        raise (CheckpointError if verdict["damaged"] else ConfigError)(verdict["refused"])
    step = verdict["step"]
    data.info = dataclasses.replace(data.info, fingerprint=verdict["fingerprint"])
    return None if step is None else store.read(step)


def _check_same_run(config: RunConfig) -> dict[str, Any] | None:
    """The settings that the folder's run was started with last, where there are any to be read."""
    path = config.out / "config.json"
    if not path.exists():
        return None
    try:
        saved = read_json_file(path)
    except DataError as error:
        if config.resume == "force":
            log.warning("--resume force: %s; what changes cannot be told", error)
            return None
        raise ConfigError(str(error)) from None
    facts = saved.pop("run", None)
    changed = differences(completed(saved), to_json(absolute(config)))
    if changed and config.resume != "force":
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
    return {**saved, "run": facts}


def _say_what_changes(
    saved: dict[str, Any], config: RunConfig, plan: RunPlan, found: Checkpoint
) -> None:
    """Every setting that differs, and the next step's learning rate and epoch, before and now."""
    facts = saved.pop("run")
    for change in differences(completed(saved), to_json(absolute(config))):
        log.warning("--resume force: %s", change)
    try:
        before = from_json(RunConfig, saved)
        plan_before = plan_run(before, int(facts["num_samples"]), world_size=1)
    except (ConfigError, TypeError, KeyError, ValueError):  # too old, or written by hand
        log.warning("--resume force: what the learning rate was is not known any more")
        return
    step = found.step
    rates = lr_at(before, plan_before, step), lr_at(config, plan, step)
    epochs = step / plan_before.steps_per_epoch, step / plan.steps_per_epoch
    for name, (was, now) in (("learning rate", rates), ("epoch", epochs)):
        if was != now:
            log.warning("--resume force: %s of step %d: %.4g -> %.4g", name, step + 1, was, now)


def _fingerprint(found: Checkpoint | None, data: OpenData) -> str:
    """SHA-256 of the data: by its manifest, by a checkpoint of when it was as it is, or read."""
    info, state = data.info, found.state if found else {}
    if info.fingerprint:
        return info.fingerprint
    same = state.get("data_identity") == info.identity
    if same and state.get("data_stamp") == data_stamp(info.paths):
        return str(state["data_fingerprint"])
    digests = []
    for file in data.files:
        if not file.info.fingerprint:
            log.info("%s: has no manifest: reading it whole, once, for the checksum", file.path)
        digests.append(file.info.fingerprint or _sha256_of(file.path))
    return joint_digest(digests)


def _check_same_data(config: RunConfig, found: Checkpoint, fingerprint: str, hashed: bool) -> None:
    """Without reading a terabyte at every start: only when the file may have changed."""
    paths, name = config.data.train, name_of(config.data.train)
    saved = found.state.get("data_fingerprint")
    if config.resume == "force":
        if saved != fingerprint:
            log.warning(
                "--resume force: %s is not the data of %s; what is kept of each sample, if"
                " anything, is of the samples of these numbers there",
                name,
                found.path,
            )
        return
    if saved != fingerprint:
        raise ConfigError(
            f"{name}: is not the data that {found.path} was trained on (fingerprint"
            f" {fingerprint[:12]}, then {str(saved)[:12]}); --resume force goes on with it anyway"
        )
    if hashed or found.state.get("data_stamp") == data_stamp(paths):
        return
    log.info("%s: written to since the checkpoint, or another copy; checking its content", name)
    content = joint_digest(
        [_sha256_of(path) for path in paths]
    )  # the fingerprint may be the manifest's word for other bytes
    if content != saved:
        raise ConfigError(
            f"{name}: its content has changed since {found.path} was trained on it (SHA-256"
            f" {content[:12]}, then {str(saved)[:12]}); copy it again, or --resume force goes on"
            " with it anyway"
        )


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)


def data_stamp(paths: Iterable[Path]) -> list[int]:
    """Bytes, and time of the last change in ns, of each file: what says without reading it that it
    is as it was. A copy that keeps times (``cp -p``, ``rsync -t``) keeps it."""
    stats = [path.stat() for path in paths]
    return [number for each in stats for number in (each.st_size, each.st_mtime_ns)]
