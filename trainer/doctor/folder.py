"""The folder that runs write to: shared by all ranks, renames whole, locks that hold."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from common.collectives import broadcast_json, rank_and_size
from trainer.doctor.finding import Finding, judged
from trainer.state.run_folder import NO_LOCKS

_PATIENCE_S = 15.0  # network file systems cache directory entries for some seconds
_LEAST_FREE = 20 * 2**30


def shared_folder(folder: Path) -> Iterator[Finding]:
    """Write, rename and lock in ``folder`` as a run does. A collective; leaves nothing behind."""
    rank, size = rank_and_size()
    token = broadcast_json(secrets.token_hex(8))
    place = folder / f".doctor-{token}"
    try:
        if rank == 0:
            place.mkdir(parents=True)
            temporary = place / "written"
            temporary.write_text(token)
            temporary.replace(place / "renamed")
        yield _visible(place, token)
        yield from _locks(place, rank, size)
        yield _free(folder)
    finally:
        if size > 1:
            dist.barrier()
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)


def _visible(place: Path, token: str) -> Finding:
    start = time.monotonic()
    while time.monotonic() - start < _PATIENCE_S:
        with contextlib.suppress(OSError):
            if (place / "renamed").read_text() == token:
                waited = time.monotonic() - start
                when = "at once" if waited < 1 else f"after {waited:.0f} s"
                return Finding("folder", "good", f"{place.parent}: seen {when}")
        time.sleep(0.1)
    return Finding(
        "folder",
        "bad",
        f"{place.parent}: what rank 0 writes there is not seen here within {_PATIENCE_S:.0f} s",
        "name a folder on a file system that all nodes share, with --out",
    )


def _locks(place: Path, rank: int, size: int) -> Iterator[Finding]:
    """Rank 0 locks; the others must not get the lock."""
    descriptor = -1
    with contextlib.suppress(OSError):
        descriptor = os.open(place / "renamed", os.O_RDWR)
    try:
        mine = _lock(descriptor) if rank == 0 else errno.EWOULDBLOCK
        if size > 1:
            dist.barrier()
        other = _lock(descriptor) if rank else errno.EWOULDBLOCK
        if size > 1:
            dist.barrier()
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if mine in NO_LOCKS:
        said = f"this file system has no file locks ({os.strerror(mine)})"
    elif other == 0 or (rank == 0 and mine):
        said = "a lock on this file system is not seen by other nodes"
    else:
        return
    yield Finding(
        "locks",
        "note",
        said,
        "nothing then stops two runs from writing one folder: give each its own",
    )


def _lock(descriptor: int) -> int:
    """0, or the number of the error that it was refused with."""
    if descriptor < 0:
        return errno.ENOENT
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _free(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    return judged(
        "disk",
        free >= _LEAST_FREE,
        f"{free / 2**30:.0f} GiB free in {folder}",
        "note",
        "checkpoints of ResNet-50 take 0.3 GB each (--checkpoint.keep)",
    )
