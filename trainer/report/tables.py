"""Tables of a page: the settings of runs, beside their recipes' and beside each other."""

import itertools
from collections.abc import Sequence

from trainer.report.contents import Contents
from trainer.report.html import Html, join, tag
from trainer.report.settings import changed, differing, flat


def scroll(table: Html, name: str, *, wide: bool = False) -> Html:
    """A table that scrolls by itself where it is wider than the page."""
    if not wide:
        return tag("div", table, class_="scroll")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def settings_tables(runs: Sequence[Contents]) -> Html:
    """In what runs differ, what each changed of its recipe, and all that it has."""
    parts = []
    if len(runs) > 1:
        rows = differing([run.settings for run in runs])
        heads = ["setting", *(run.name for run in runs)]
        parts.append(tag("p", "Settings in which the runs differ:" if rows else "None differ."))
        if rows:
            cells = [[name, *values] for name, values in rows.items()]
            parts.append(scroll(_table(heads, cells), "Differing settings", wide=True))
    for run in runs:
        other = changed(run.settings)
        recipe = run.settings.get("recipe")
        whose = [tag("bdi", run.name), ": "] if len(runs) > 1 else []
        if other is None:
            parts.append(tag("p", whose, f"No recipe {recipe!r} here to compare with."))
        elif not other:
            parts.append(tag("p", whose, f"As the recipe {recipe} has them, but for the data."))
        else:
            parts.append(tag("p", whose, f"Different from the recipe {recipe}:"))
            cells = [[name, *pair] for name, pair in other.items()]
            parts.append(scroll(_table(["setting", "recipe", "run"], cells), "Changed settings"))
        every = [[name, value] for name, value in flat(run.settings).items()]
        table = _table(["setting", "value"], every, marked=set(other or ()))
        summary = tag("summary", "All settings", [" of ", tag("bdi", run.name)] if whose else None)
        parts.append(tag("details", summary, table))
    return join(parts)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], marked: set[str] | None = None
) -> Html:
    head = tag("tr", [tag("th", tag("bdi", name), scope="col") for name in heads])
    body = [
        tag(
            "tr",
            tag("th", _breakable(row[0]), scope="row"),
            [tag("td", tag("bdi", cell)) for cell in row[1:]],
            class_="changed" if marked and row[0] in marked else None,
        )
        for row in rows
    ]
    return tag("table", tag("thead", head), tag("tbody", body))


def _breakable(name: str) -> Html:
    """A dotted name that may go on in the next line after a dot."""
    parts = name.split(".")
    dotted = [f"{part}." for part in parts[:-1]] + parts[-1:]
    return join(itertools.chain.from_iterable((part, tag("wbr")) for part in dotted))
