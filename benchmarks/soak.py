"""Whether a long run grows: resident memory and open files of every rank, and what it leaves.

    python benchmarks/soak.py --minutes 60 [--processes 2] [--json FILE]

Trains on the embedded digits with a checkpoint every few steps and an online kNN every epoch, looks
at every rank twice a minute, and fits a line to what it saw after the first quarter. In the end the
run is stopped as Ctrl-C does, and no process, socket or temporary file of it may be left.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOOKS_EVERY = 30.0  # seconds
MARK = "WIDEBATCH_SOAK"


@dataclass(frozen=True)
class Look:
    """A rank at a moment."""

    rank: int
    minutes: float
    resident_mb: float
    files: int
    threads: int


def look(pid: int, rank: int, minutes: float) -> Look:
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    return Look(
        rank,
        minutes,
        int(status["VmRSS"].split()[0]) / 1024,
        len(list((process / "fd").iterdir())),
        int(status["Threads"]),
    )


def ranks_of(mark: str) -> dict[int, int]:
    """Process numbers of the run's ranks, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile, or is another user's
        environ = dict(word.split(b"=", 1) for word in words if b"=" in word)
        is_rank = b"pretrain" in command and b"torch.distributed.run" not in command
        if environ.get(MARK.encode()) == mark.encode() and b"RANK" in environ and is_rank:
            found[int(environ[b"RANK"])] = int(process.name)
    return found


def left_behind(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def slope_per_hour(looks: list[Look], field: str) -> float:
    """Of the line of least squares through what was seen after the first quarter."""
    last = max(item.minutes for item in looks)
    late = [item for item in looks if item.minutes >= last / 4]
    line = statistics.linear_regression(
        [item.minutes / 60 for item in late], [getattr(item, field) for item in late]
    )
    return line.slope


def soak(folder: Path, minutes: float, processes: int) -> tuple[list[Look], list[str]]:
    data = {name: folder / f"{name}.beton" for name in ("train", "test")}
    for name, path in data.items():
        pack = [sys.executable, "-m", "launch", "pack", f"embedded:digits:{name}", str(path)]
        subprocess.run(pack, check=True, capture_output=True)
    mark = str(os.getpid())
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", "launch", "pretrain", "digits-demo"),
        *("--encoder.name", "resnet18", "--encoder.stem", "imagenet"),
        *("--data.train", str(data["train"]), "--data.test", str(data["test"])),
        *("--batch", "64", "--epochs", "100000", "--knn.every-epochs", "1"),
        *("--checkpoint.every-steps", "10", "--device", "cpu", "--out", str(folder / "run")),
    ]
    environ = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    looks: list[Look] = []
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        start = time.monotonic()
        while run.poll() is None and time.monotonic() - start < minutes * 60:
            time.sleep(LOOKS_EVERY)
            now = (time.monotonic() - start) / 60
            looks += [look(pid, rank, now) for rank, pid in ranks_of(mark).items()]
        if run.poll() is not None:
            sys.exit(f"the run ended by itself: {(folder / 'log').read_text()[-2000:]}")
        run.send_signal(signal.SIGINT)
        run.wait(120)
    left = [f"process {command}" for command in left_behind(mark)]
    left += [f"file {path}" for path in folder.rglob(".writing-*")]
    return looks, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        looks, left = soak(Path(folder), args.minutes, args.processes)
        steps = (Path(folder) / "run" / "metrics.jsonl").read_bytes().count(b"\n")
        checkpoints = steps // 10
    print(f"{args.minutes:g} minutes, {steps} steps, about {checkpoints} checkpoints")
    print("rank  resident MB: first quarter's end .. end, slope/h  open files, slope/h  threads")
    for rank in sorted({item.rank for item in looks}):
        mine = [item for item in looks if item.rank == rank]
        early, end = mine[len(mine) // 4], mine[-1]
        print(
            f"{rank:4d}  {early.resident_mb:8.0f} .. {end.resident_mb:.0f},"
            f" {slope_per_hour(mine, 'resident_mb'):+.1f}"
            f"  {end.files}, {slope_per_hour(mine, 'files'):+.2f}  {end.threads}"
        )
    print("\n".join(f"left behind: {item}" for item in left) or "nothing left behind")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(item) for item in looks], indent=1) + "\n")


if __name__ == "__main__":
    main()
