"""Everything that a report says of one run, as plain values: read once, drawn by others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.health.heartbeat import ranks_in
from trainer.report.evaluations import Bar, Measured, read_measured
from trainer.report.history import History, read_history
from trainer.report.pictures import Pictures, attempt
from trainer.state.run_data import read_settings, section
from trainer.state.run_list import read_run
from trainer.state.settings import flat


@dataclass(frozen=True)
class Contents:
    """One run. What is not there is empty, and ``missing`` says why."""

    run: Path
    name: str
    settings: dict[str, Any]
    state: str
    """Where it stands, for people."""
    history: History
    measured: tuple[Measured, ...]
    pictures: Pictures
    missing: tuple[tuple[str, str], ...]
    """Part and reason."""

    @property
    def bars(self) -> list[Bar]:
        """The accuracies among what was measured."""
        return [each.bar for each in self.measured if each.bar]


def read_contents(runs: Sequence[Path], pictures: Pictures) -> list[Contents]:
    """Read the folders of one or more runs, each called by what tells it apart.

    Raises:
        ConfigError: one of them is no run's folder.
    """
    return [_read(run, name, pictures) for run, name in zip(runs, names(runs))]


def _read(run: Path, name: str, pictures: Pictures) -> Contents:
    settings = read_settings(run)
    missing: list[tuple[str, str]] = []
    history = attempt(missing, "curves", lambda: read_history(run)) or History()
    measured = attempt(missing, "evaluations", lambda: read_measured(run))
    return Contents(
        run,
        name,
        settings,
        _state(run, settings, history),
        history,
        measured or (),
        pictures,
        (*missing, *pictures.missing),
    )


def names(runs: Sequence[Path]) -> list[str]:
    """Names of runs: the ends of their paths, as long as it takes to tell them apart."""
    parts = [run.resolve().parts[1:] or ("/",) for run in runs]
    longest = max(len(part) for part in parts)
    for length in range(1, longest + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(set(parts)):
            break
    return found


def _state(run: Path, settings: dict[str, Any], history: History) -> str:
    step, total = history.last_step, section(settings, "run").get("total_steps")
    where = f"step {step:,} of {total:,}" if type(total) is int else f"step {step:,}"
    if type(total) is int and step >= total:
        return f"finished, {where}"
    if not ranks_in(run / "heartbeats"):
        return where
    facts = read_run(run)
    return f"{facts.state}{f' ({facts.why})' if facts.why else ''}, {where}"


def differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings in which runs differ: name to each run's value, ``-`` where it has none."""
    each = [flat(settings) for settings in runs]
    names = sorted({name for values in each for name in values})
    rows = {name: [values.get(name, "-") for values in each] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def title(settings: Mapping[str, Any]) -> str:
    """Recipe, encoder and length of a run, in one line."""
    steps, batch = section(settings, "run").get("total_steps"), settings.get("batch")
    encoder = section(settings, "encoder").get("name", "encoder")
    known = type(steps) is int and type(batch) is int
    length = f", {steps:,} steps of {batch:,} images" if known else ""
    return f"{settings.get('recipe') or 'run'}: {encoder}{length}"
