"""One self-contained page of one or more runs: no other file, no network."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from common.files.atomic_file import as_utf8, write_atomically
from common.files.strict_json import dump_json
from trainer.report.charts import PLOTLY, maps, themes
from trainer.report.contents import Contents
from trainer.report.looks import class_name
from trainer.report.pictures import SHEET_COLUMNS, data_uri, sheet
from trainer.report.sections import values
from trainer.report.settings import title

_FOLDER = Path(__file__).parent
_STYLE = (_FOLDER / "page.css").read_text("utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text("utf-8")
# What HTML does not allow even in escaped form, and halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def _allowed(value: Any) -> Any:
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return _FORBIDDEN.sub("\ufffd", value) if plain else value


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_allowed,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {
    "class_name": class_name,
    "columns": SHEET_COLUMNS,
    "data_uri": data_uri,
    "maps": maps,
    "plotly": Markup(PLOTLY[1]),  # noqa: S704  # as it was installed
    "library": PLOTLY[0],
    "recipe_title": title,
    "script": Markup(_SCRIPT),  # noqa: S704
    "sheet": sheet,
    "style": Markup(_STYLE),  # noqa: S704
    "themes": dump_json(themes()),
}
_PAGE = _TEMPLATES.get_template("page.html")


def content_security_policy(*, live: bool) -> str:
    """What a page may do: show its own images, use its own style and scripts, nothing else.

    Args:
        live: whether it asks its server for Plotly and for news.
    """
    own = "'self'"
    rules = [
        "default-src 'none'",
        "img-src data: blob:",  # Plotly saves a chart as PNG by way of a blob
        "style-src 'unsafe-inline'",  # Plotly adds styles of its own
        f"script-src {_hash(_SCRIPT)} {own if live else _hash(PLOTLY[1])}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*rules, f"connect-src {own}"] if live else rules)


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def page(runs: Sequence[Contents], *, live_seconds: float = 0.0) -> str:
    """The page. The same contents make the same text.

    Args:
        runs: one or more; several are compared.
        live_seconds: between two looks for news, of a page that a server keeps up to date; 0: it
            stands for itself.
    """
    policy = content_security_policy(live=live_seconds > 0)
    return _PAGE.render(values(runs), policy=policy, live=live_seconds)


def write_page(path: Path, content: str) -> None:
    """Write a page, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_utf8(content))
