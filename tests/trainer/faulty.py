"""Runs in which something goes wrong on purpose: what each rank said, and how it ended."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.exit_codes import exit_code_for
from launch.preemption import StopSignal
from tests.dist import run_ranks
from tests.faults import armed
from tests.trainer.runs import SMALL_ENCODER
from tests.trainer.tiny import tiny_config
from trainer.config import RunConfig, from_json, to_json
from trainer.health.watchdog import WatchdogConfig

RETRYABLE = 74
WATCHED = WatchdogConfig(timeout=12, patience=120, warning=6)
"""Short, and still long enough for a machine that is busy with other things."""


def small_config(data: Path, out: Path, **changes: Any) -> RunConfig:
    """Steps of milliseconds."""
    return tiny_config(data, out, **{"encoder": SMALL_ENCODER, **changes})


def train_with_faults(
    world_size: int,
    config: RunConfig,
    faults: str = "",
    *,
    exits: Mapping[int, int] | None = None,
    spoil: Callable[[int], None] | None = None,
    timeout: float = 200,
) -> list[str | None]:
    """Train as the command does, errors and all.

    Args:
        world_size: number of processes.
        config: the run.
        faults: as :mod:`tests.faults` reads them.
        exits: how ranks are to end that do not end well.
        spoil: called in each rank, with its number, before it trains.
        timeout: seconds.

    Returns:
        What each rank logged, and in the last line how it ended; ``None`` where it was killed.
    """
    run_ranks(
        _train,
        world_size,
        to_json(config),
        spoil,
        timeout=timeout,
        init_process_group=False,
        env={"WIDEBATCH_FAULTS": armed(faults)},
        expected_exits=exits or {},
    )
    paths = [config.out.parent / f"said-{config.out.name}-{rank}" for rank in range(world_size)]
    return [path.read_text() if path.exists() else None for path in paths]


def _train(
    rank: int, world_size: int, values: dict[str, Any], spoil: Callable[[int], None] | None
) -> None:
    from trainer.loop import fit

    stop = StopSignal().__enter__()  # to the process's end
    config = from_json(RunConfig, values)
    said = config.out.parent / f"said-{config.out.name}-{rank}"
    said.unlink(missing_ok=True)
    handler = logging.FileHandler(said)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if spoil is not None:
        spoil(rank)
    try:
        logging.info("ended: %s", fit(config, stop).value)
    except (Exception, KeyboardInterrupt) as error:
        logging.info("ended: %s: %s", type(error).__name__, error)
        handler.flush()
        os._exit(stop.code if stop() else exit_code_for(error))
