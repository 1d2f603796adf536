"""The table of faults and promises, with the tests that hold each: ``docs/reliability.md``.

A test says which row it holds by ``@pytest.mark.reliability(row)``. A session that is given
``--reliability=FILE`` writes the table there when it ends, with what each test did in it; tests
that were not part of the session keep the result of the last one that ran them, with its date, from
pytest's cache.
"""

import datetime
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

CACHE_KEY = "widebatch/reliability"

ROWS = {
    1: ("the same seed twice", "equal, identical losses"),
    2: ("stopped at step 1, mid-epoch, at an epoch's end, at the last step; gone on with", "equal"),
    3: (
        "SIGKILL of one of 4 ranks",
        "every process exits non-zero within the timeout; going on is equal",
    ),
    4: (
        "SIGKILL at each named point of a save",
        "the newest complete checkpoint loads, never a partial one",
    ),
    5: (
        "SIGKILL of rank 0 during an asynchronous write",
        "the previous checkpoint stands; the next save works",
    ),
    6: (
        "disk full; a failing write and fsync",
        "old checkpoint intact, temporary gone, error named; repeated failure ends with the"
        " retryable exit code",
    ),
    7: (
        "checkpoint files cut to 0, 1, half, all but 1 bytes",
        "the error names the file; the previous one serves",
    ),
    8: (
        "one bit flipped in each checkpoint file",
        "the file is named by its checksum; the previous one serves",
    ),
    9: (
        "tensors, the manifest or the latest-pointer deleted",
        "never a silent fresh start",
    ),
    10: ("retention with partial directories about", "at least two valid checkpoints survive"),
    11: (
        "world size 4, 2, 1, 3 with one global batch",
        "the same sample ids in every step; loss within a stated tolerance",
    ),
    12: ("a global batch that does not divide", "refused before step 0, with the nearest that do"),
    13: (
        "NT-Xent at world size 1, 2, 3, 4",
        "value and gradient within 1e-6 (fp64) of one process",
    ),
    14: (
        "NaN or infinity on one rank",
        "no rank updates; several in a row: stop with the sample ids, or roll back",
    ),
    15: ("constant embeddings", "collapse alarm within a stated number of steps"),
    16: (
        "one rank skips a collective",
        "everything aborts within the timeout; the report names rank and operation",
    ),
    17: ("SIGSTOP of a rank for 5 s, and for ever", "a warning; killed and started again"),
    18: ("one rank 3 times slower", "named as straggler; no false alarm in 200 clean steps"),
    19: (
        "corrupt JPEG, zero-size or out-of-bounds sample in a .beton",
        "counted, replaced by a deterministic substitute within a budget; the process lives",
    ),
    20: ("data file changed between runs", "going on is refused unless asked for"),
    21: ("other TZ, PYTHONHASHSEED, loader worker count, clock a day off", "equal"),
    22: (
        "SIGTERM or SIGUSR1 in a step, a save, a load, an evaluation; twice",
        "saved in time, exit code 'preempted', equal when gone on with",
    ),
    23: ("a loader worker killed", "error with the rank's name; no hang"),
    24: ("Slurm: --signal before the time limit", "checkpoint, requeued once, equal"),
    25: ("Slurm: scontrol requeue; scancel", "equal; not requeued"),
    26: (
        "Slurm: a node loses power; a node is drained",
        "the job restarts; equal at the same number of ranks",
    ),
    27: ("Slurm: preemption by a higher partition", "as 24"),
    28: (
        "a crash loop",
        "a restart budget ends it; a fatal error is never started again",
    ),
    29: (
        "minutes of seeded random faults",
        "equal; no orphan process, port or temporary file",
    ),
    30: (
        "hostile files: pickle, oversized headers, overlapping offsets, symlinks, `..` in names",
        "all refused; a sentinel that the payload would write is absent",
    ),
}
"""What is done to a run, and what must hold then."""


@dataclass
class Result:
    """What a test did when it last ran."""

    rows: list[int]
    outcome: str
    seconds: float
    date: str


class Recorder:
    """Collects the results of marked tests; one per session."""

    def __init__(self, page: Path | None, cache: pytest.Cache) -> None:
        self._page, self._cache = page, cache
        known: dict[str, dict[str, Any]] = cache.get(CACHE_KEY, {})
        self._results = {name: Result(**values) for name, values in known.items()}
        self._rows: dict[str, list[int]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note which collected tests hold which rows."""
        for item in items:
            rows = sorted({row for mark in item.iter_markers("reliability") for row in mark.args})
            unknown = [row for row in rows if row not in ROWS]
            if unknown:
                raise pytest.UsageError(f"{item.nodeid}: reliability has no row {unknown[0]}")
            if rows:
                self._rows[item.nodeid] = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended: the worst of set-up, call and tear-down."""
        rows = self._rows.get(report.nodeid)
        if rows is None or (report.when != "call" and report.passed):
            return
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        self._results[report.nodeid] = Result(rows, report.outcome, report.duration, today)

    def pytest_sessionfinish(self) -> None:
        """Keep the results, and write the page if one was asked for."""
        for name in list(self._results):
            if not Path(name.split("::")[0]).exists():
                del self._results[name]
        self._cache.set(CACHE_KEY, {name: asdict(r) for name, r in self._results.items()})
        if self._page is not None:
            self._page.write_text(page(self._results))


def page(results: dict[str, Result]) -> str:
    """The Markdown page for these results, by test."""
    lines = [
        "# What holds under faults, and the tests that hold it",
        "",
        "Written by the test run (`make test-all`), not by hand. *Equal* means: parameters,"
        " optimizer state, moving averages, queue and the log of sample ids are byte for byte those"
        " of the run that nobody disturbed. On CPU with gloo, up to 4 ranks, and on a real local"
        f" Slurm cluster; no GPU has run it. Python {platform.python_version()}.",
        "",
        "| # | what is done to a run | what must hold | tests | last result | time |",
        "|---|---|---|---|---|---|",
    ]
    for row, (fault, promise) in ROWS.items():
        of_row = {name: r for name, r in results.items() if row in r.rows}
        lines.append(f"| {row} | {fault} | {promise} | {_cells(of_row)} |")
    return "\n".join(lines) + "\n"


def _cells(results: dict[str, Result]) -> str:
    if not results:
        return "none | - | -"
    functions: dict[str, int] = {}
    for name in results:
        function = name.split("[")[0].removeprefix("tests/")
        functions[function] = functions.get(function, 0) + 1
    names = "<br>".join(
        f"`{name}`" + (f" x {count}" if count > 1 else "") for name, count in functions.items()
    )
    outcomes = [r.outcome for r in results.values()]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))
    date = min(r.date for r in results.values())
    return f"{names} | {counts}, {date} | {sum(r.seconds for r in results.values()):.0f} s"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--reliability=FILE``; pytest takes a FILE after a blank for a place to collect tests."""
    parser.addoption("--reliability", type=Path, help="write the table of promises under faults")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the main process."""
    page, cache = config.getoption("--reliability"), getattr(config, "cache", None)
    if cache is not None:
        config.pluginmanager.register(Recorder(page, cache))
    elif page is not None:
        raise pytest.UsageError("--reliability needs pytest's cache: leave out -p no:cacheprovider")
