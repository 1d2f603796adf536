"""``python -m trainer.wandb_sender RUN PROJECT``: send a run's records to Weights & Biases.

Started by :mod:`trainer.telemetry.wandb_reader` beside rank 0, never by hand. It reads
``metrics.jsonl`` as that grows, until its standard input ends, and exits with 1 and one line on
what went wrong. ``WANDB_MODE=offline``, ``WANDB_API_KEY`` and the rest are W&B's own and work as
usual; it never asks, as there is nobody to answer.
"""

import argparse
import json
import secrets
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.atomic_file import write_atomically
from data_pipeline.strict_json import dump_json, read_json_file

_INTERVAL = 1.0  # seconds between two looks at the file

# Its defaults would save the command line, the host, the commit, all packages and what is printed.
_RECORDS_ALONE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class Memory:
    """RUN/wandb/widebatch.json: which run of W&B this is, and the last step that it has."""

    def __init__(self, out: Path) -> None:
        self._path = out / "wandb" / "widebatch.json"
        try:
            known = read_json_file(self._path)
        except FileNotFoundError:
            known = {}
        self.identity: str | None = known.get("id")
        self.step = int(known.get("step", 0))

    def keep(self) -> None:
        """Write it."""
        text = dump_json({"id": self.identity, "step": self.step}) + "\n"
        write_atomically(self._path, text.encode(), private=True)


def begin(out: Path, project: str, memory: Memory) -> Any:
    """Begin a run of W&B, or go on with the one that ``memory`` names."""
    import wandb

    entity, _, name = project.strip("/").rpartition("/")
    memory.identity = memory.identity or secrets.token_hex(8)
    run = wandb.init(
        entity=entity or None,
        project=name,
        id=memory.identity,
        resume="allow",
        name=out.name,
        dir=str(out),
        config=read_json_file(out / "config.json"),
        settings=wandb.Settings(silent=True, **_RECORDS_ALONE),
    )
    memory.keep()
    print(f"sending to {run.settings.sync_dir if run.offline else run.url}", flush=True)
    return run


def send(run: Any, records: list[dict[str, Any]], memory: Memory) -> None:
    """Log every number of every record.

    W&B cannot take back what it has: the steps that a resumed run repeats are left out.
    """
    for record in records:
        if record["step"] <= memory.step:
            continue
        numbers = {
            name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        run.log(numbers, step=record["step"])
        run.summary.update({n: v for n, v in numbers.items() if n.startswith("knn_")})
        memory.step = record["step"]
    if records:
        memory.keep()


def records_of(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Whole lines that were added since the last look, again and again."""
    torn = b""
    with path.open("rb") as file:
        while True:
            *lines, torn = (torn + file.read()).split(b"\n")
            yield [json.loads(line) for line in lines]


def word(seconds: float) -> bytes | None:
    """What standard input said last when it has ended; None while it is open."""
    if not select.select([sys.stdin.buffer], [], [], seconds)[0]:
        return None
    return sys.stdin.buffer.read()


def main() -> int:
    """Send until the run ends. W&B learns whether it came to an end of its own."""
    parser = argparse.ArgumentParser(prog="trainer.wandb_sender", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("project")
    args = parser.parse_args()
    out = args.out
    try:
        memory = Memory(out)
        run = begin(out, args.project, memory)
        for records in records_of(out / "metrics.jsonl"):
            send(run, records, memory)
            last_word = word(_INTERVAL)
            if last_word is not None:
                break
        send(run, next(records_of(out / "metrics.jsonl")), memory)
        run.finish(exit_code=0 if last_word else 1)
    except Exception as error:  # whatever W&B has met with: one line for the log of the run
        lines = str(error).strip().splitlines() or [""]
        print(f"{type(error).__name__}: {lines[0]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
