"""Stands in for ``python -P -m launch pretrain`` where a test is about the job script alone.

Counts to ``STEPS`` (20 a second), as a run would, from where ``OUT/step.N`` of its rank N says it
stopped. On USR1 or TERM it saves its count there and leaves word that it was preempted; exit 0.
``FAIL_RANK`` ends when rank 0 listens for signals: with word of ``FAIL_CODE``, or without one as if
killed. In the first ``DEAF`` seconds of the first start nobody
listens, as while a program is still importing.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    rank, start = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    record = {"arguments": sys.argv[1:], "environ": dict(os.environ), "cwd": str(Path.cwd())}
    (out / f"start{start}.rank{rank}.json").write_text(json.dumps(record))
    if os.environ.get("FAIL_RANK") == rank:
        while not (out / "listening.0").exists():
            time.sleep(0.05)
        if "FAIL_CODE" in os.environ:
            leave_word(int(os.environ["FAIL_CODE"]))
        return 3
    if start == "0":
        time.sleep(float(os.environ.get("DEAF", "0")))

    stop: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    (out / f"listening.{rank}").touch()
    saved = out / f"step.{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    while step < int(os.environ.get("STEPS", "10")):
        step += 1
        time.sleep(0.05)
        if stop:  # after a step, as a run is: however slow the machine, each start takes one
            saved.write_text(str(step))
            leave_word(75)
            return 0
    (out / f"done.{rank}").write_text(str(step))
    return 0


def leave_word(code: int) -> None:
    folder = Path(os.environ["WIDEBATCH_ENDINGS"])
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{os.environ['SLURM_PROCID']}").write_text(f"{code}\n")


if __name__ == "__main__":
    sys.exit(main())
