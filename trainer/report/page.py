"""One self-contained page of one or more runs: no other file, no network, no foreign script."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from common.files.atomic_file import as_utf8, write_atomically
from trainer.report.contents import Contents
from trainer.report.html import Html, join, tag, text
from trainer.report.sections import Section, sections
from trainer.report.settings import title

_STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
_SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def content_security_policy(*, live: bool) -> str:
    """What a page may do: show its own images, use our style and our script, nothing else.

    Args:
        live: whether it asks its server for news.
    """
    rules = [
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(_STYLE)}",
        f"script-src {_hash(_SCRIPT)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*rules, "connect-src 'self'"] if live else rules)


def page(runs: Sequence[Contents], *, live_seconds: float = 0.0) -> str:
    """The page. The same contents make the same text.

    Args:
        runs: one or more; several are compared.
        live_seconds: between two looks for news, of a page that a server keeps up to date; 0: it
            stands for itself.
    """
    parts = sections(runs)
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = join([_header(runs, name, parts, live_seconds), _main(parts), _footer()])
    policy = content_security_policy(live=live_seconds > 0)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),  # or browsers ask a live page's server for one
        tag("title", f"{name}: Widebatch report"),
        tag("style", Html(_STYLE)),
    )
    live = f"{live_seconds:g}" if live_seconds else None
    script = tag("script", Html(_SCRIPT))
    body = tag("body", body, script, data_live=live)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def write_page(path: Path, content: str) -> None:
    """Write a page, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_utf8(content))


def _header(
    runs: Sequence[Contents], name: str, parts: Sequence[Section], live_seconds: float
) -> Html:
    heading = tag("bdi", name)
    if len(runs) == 1:
        lines = [tag("p", f"{title(runs[0].settings)}. {runs[0].state.capitalize()}.")]
    else:
        lines = [tag("p", "Compared: ", join(_commas(runs)))]
    links = [tag("li", tag("a", part.heading, href=f"#{part.identity}")) for part in parts]
    live = "Live: this page follows the run."
    status = tag("p", live, class_="live hint", role="status") if live_seconds else None
    # The status is the script's own: it is no part of what is replaced.
    told = join([tag("h1", heading), *lines])
    return tag(
        "header",
        tag("a", "Skip to the summary", href="#summary", class_="skip-link"),
        tag("div", told, id="head", data_part=_digest(told)),
        status,
        tag(
            "nav",
            tag("ul", links),
            aria_label="Parts of the report",
            id="parts",
            data_part=_digest(join(links)),
        ),
    )


def _commas(runs: Sequence[Contents]) -> list[Html]:
    return [join([", " if number else "", tag("bdi", run.name)]) for number, run in enumerate(runs)]


def _main(parts: Sequence[Section]) -> Html:
    return tag(
        "main",
        [
            tag(
                "section",
                tag("h2", part.heading, id=f"heading-{part.identity}"),
                part.body,
                id=part.identity,
                aria_labelledby=f"heading-{part.identity}",
                data_part=_digest(part.body),
            )
            for part in parts
        ],
    )


def _footer() -> Html:
    return tag("footer", tag("p", "Made by ", tag("code", "widebatch report"), "."))


def _digest(markup: Html) -> str:
    return hashlib.sha256(text(markup).encode()).hexdigest()[:16]
