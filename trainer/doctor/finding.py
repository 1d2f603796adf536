"""What one check says, and all ranks' findings in one list."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from common.collectives import all_gather_json
from common.errors import ConfigError, DataError

Verdict = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    verdict: Verdict
    said: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def judged(check: str, good: bool, said: str, otherwise: Verdict, remedy: str) -> Finding:
    """What was found; with the remedy if it is not good, but ``otherwise``."""
    return Finding(check, "good", said) if good else Finding(check, otherwise, said, remedy)


Check = Callable[[], Iterable[Finding]]


def examined(name: str, check: Check) -> list[Finding]:
    """A check's findings; one that fails is a finding too."""
    try:
        return list(check())
    except Exception as error:  # whatever it is, the other checks go on and the user hears of it
        said = " ".join(str(error).split())
        if isinstance(error, ConfigError | DataError):  # these bring their remedy along
            return [Finding(name, "bad", said)]
        said = f"{type(error).__name__}: {said}"
        return [Finding(name, "bad", said, "not foreseen: report it with this table")]


def of_all_ranks(mine: Sequence[Finding]) -> list[tuple[Finding, list[int]]]:
    """All ranks' findings, equal ones together, with the ranks that made them. A collective."""
    merged: dict[Finding, list[int]] = {}
    for rank, found in enumerate(all_gather_json([asdict(finding) for finding in mine])):
        for values in found:
            merged.setdefault(Finding(**values), []).append(rank)
    return list(merged.items())


def table(findings: Sequence[tuple[Finding, list[int]]], world_size: int) -> str:
    """For a person: a line each, remedies below what they are for."""
    lines = []
    for finding, ranks in findings:
        where = "" if len(ranks) == world_size else f"  [rank {_spans(ranks)}]"
        lines.append(f"{finding.verdict:<5} {finding.check:<14} {finding.said}{where}")
        if finding.remedy:
            lines.append(f"{'':<5} {'':<14} -> {finding.remedy}")
    return "\n".join(lines)


def _spans(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
