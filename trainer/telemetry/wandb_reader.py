"""Weights & Biases, where it is installed and asked for: the records of the run, and nothing else.

W&B sends them by a process of its own, but waits for that one without a limit of time: as it
begins, takes records and ends. So it is a thread that waits, and training goes on whatever W&B
does. ``WANDB_MODE=offline``, ``WANDB_API_KEY`` and the rest are W&B's own and work as usual; it
never asks, as there is nobody to answer.
"""

import contextlib
import importlib.util
import logging
import os
import queue
import secrets
import signal
import threading
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files.atomic_file import write_atomically
from common.files.strict_json import dump_json, read_json_file
from trainer.telemetry.stream import Reader, Record, TelemetryConfig

log = logging.getLogger(__name__)

_PATIENCE = 90.0  # seconds that W&B has to begin, and to send the rest at the end of a run
_MOST_WAITING = 4096  # lists of records that W&B has not taken

# Its defaults would save the command line, the host, the commit, all packages and what is printed,
# and a button in the browser would send SIGINT.
_RECORDS_ALONE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "silent": True,
    "stop_fn": lambda: None,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def refuse_missing(config: TelemetryConfig) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        ConfigError: says how to install it.
    """
    if config.wandb is None:
        return
    if not config.wandb.strip("/"):
        raise ConfigError("--telemetry.wandb: name a project, or ENTITY/PROJECT")
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a mere folder: W&B leaves one of its own name about
        raise ConfigError(
            f"--telemetry.wandb {config.wandb}: Weights & Biases is not installed;"
            " pip install wandb, or leave the setting out"
        )


class WeightsAndBiases(Reader):
    """Sends records; what goes wrong is logged once.

    Args:
        project: PROJECT, or ENTITY/PROJECT.
        out: the run's folder; config.json is in it when records come.
        patience: seconds to begin and to end.
    """

    def __init__(self, project: str, out: Path, patience: float = _PATIENCE) -> None:
        self._project, self._out, self._patience = project, out, patience
        self._waiting: queue.Queue[list[Record] | None] = queue.Queue(_MOST_WAITING)
        self._sender = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._given_up = False

    def read(self, records: list[Record]) -> None:
        """Hand the records over."""
        if self._given_up:
            return
        if self._sender.ident is None:
            self._sender.start()
        try:
            self._waiting.put_nowait(records)
        except queue.Full:
            self._give_up("it takes none")

    def close(self) -> None:
        """Let W&B send the rest, for as long as that is worth waiting for."""
        if self._sender.ident is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._sender.join(0 if self._given_up else self._patience)
        if self._sender.is_alive():
            self._give_up(f"it did not end within {self._patience:g} s")
            _kill_service()
            self._sender.join(1)

    def _send(self) -> None:
        try:
            import wandb

            try:
                self._send_all(wandb)
            finally:
                wandb.teardown()  # here, and not as the interpreter exits
        except Exception as error:  # whatever W&B has met with: one line for the log of the run
            self._give_up(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")

    def _send_all(self, wandb: Any) -> None:
        # Which run of W&B this is, and the last step that it has and cannot take back.
        path, known = self._out / "wandb" / "widebatch.json", {}
        with contextlib.suppress(FileNotFoundError):
            known = read_json_file(path)
        known.setdefault("id", secrets.token_hex(8))
        entity, _, name = self._project.strip("/").rpartition("/")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        limits = {"init_timeout": self._patience, "finish_timeout": self._patience}
        wandb.setup(wandb.Settings(**limits, finish_timeout_raises=True, **_RECORDS_ALONE))
        run = wandb.init(
            entity=entity or None,
            project=name,
            id=known["id"],
            resume="allow",
            name=self._out.name,
            dir=str(self._out),
            config=read_json_file(self._out / "config.json"),
        )
        while (records := self._waiting.get()) is not None:
            for record in records:
                if record["step"] > known.get("step", 0):
                    known["step"] = record["step"]
                    numbers = {n: v for n, v in record.items() if isinstance(v, int | float)}
                    run.log(numbers, step=numbers.pop("step"))
            write_atomically(path, dump_json(known).encode(), private=True)
        run.finish()

    def _give_up(self, why: str) -> None:
        if not self._given_up:
            self._given_up = True
            log.warning(
                "W&B gets no more records: %s; the run goes on, and metrics.jsonl has them all", why
            )


def _kill_service() -> None:
    """End W&B's process, which it would wait for when this one exits."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended since
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb"):
                    os.kill(int(pid), signal.SIGKILL)
