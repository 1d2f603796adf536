"""Weights & Biases, where it is installed and asked for: the records of the run, and nothing else.

W&B brings a process, threads, hooks on exit and often a network along. None of it gets into the
training process: :mod:`trainer.wandb_sender` runs as a program of its own, reads what
``metrics.jsonl`` gets, and sends it. What goes wrong there is logged once, and training goes on.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

from trainer.errors import ConfigError
from trainer.telemetry.stream import Record, TelemetryConfig

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 90.0  # seconds that W&B has to send the rest at the end of a run


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


class WeightsAndBiases:
    """Keeps the sender alongside the run.

    Args:
        project: PROJECT, or ENTITY/PROJECT.
        out: the run's folder; config.json and metrics.jsonl are in it when records come.
        patience: seconds that the sender has to end when the run does.
    """

    def __init__(self, project: str, out: Path, patience: float = _PATIENCE) -> None:
        self._project, self._out, self._patience = project, out, patience
        self._sender: subprocess.Popen[bytes] | None = None
        self._given_up = False

    def read(self, records: list[Record]) -> None:
        """Start the sender with the first records; later, see that it is there."""
        if self._given_up:
            return
        if self._sender is None:
            self._start()
        elif self._sender.poll() is not None:
            self._give_up(f"its sender ended with status {self._sender.returncode}")

    def close(self) -> None:
        """Let the sender send the rest, for as long as that is worth waiting for."""
        if self._sender is None:
            return
        if not self._given_up:
            try:
                # Its standard input is open as long as the run lives, and this word says that the
                # run has come to an end of its own.
                self._sender.communicate(b"closed\n", timeout=self._patience)
            except subprocess.TimeoutExpired:
                self._give_up(f"its sender did not end within {self._patience:g} s")
            else:
                if self._sender.returncode:
                    self._give_up(f"its sender ended with status {self._sender.returncode}")
        self._sender.kill()  # W&B's own process ends with the one that it was started from
        self._sender.wait()

    @property
    def _log_path(self) -> Path:
        return self._out / "wandb" / "sender.log"

    def _start(self) -> None:
        # -P: no file of the folder that the run was started in is taken for a module.
        command = [sys.executable, "-P", "-m", "trainer.wandb_sender"]
        command += [str(self._out.resolve()), self._project]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._log_path.parent.mkdir(mode=0o700, exist_ok=True)
            said = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                self._sender = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,  # Ctrl-C is for the run, which then closes the sender
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                )
            finally:
                os.close(said)
        except OSError as error:
            self._give_up(f"its sender could not be started: {error}")

    def _give_up(self, why: str) -> None:
        self._given_up = True
        log.warning(
            "W&B gets no more records: %s%s; the run goes on, and metrics.jsonl has them all",
            why,
            self._last_words(),
        )

    def _last_words(self) -> str:
        try:
            lines = self._log_path.read_text(errors="replace").split("\n")
        except OSError:
            return ""
        words = [line.strip() for line in lines if line.strip()]
        return f" ({words[-1]})" if words else ""
