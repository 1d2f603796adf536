"""Sphinx' settings for `make docs`: from Markdown to pages that open without network."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar

import pygments.lexers.shell
from pygments.lexer import Lexer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import reference_pages  # noqa: E402  (beside this file)

project = "Widebatch"
author = "Widebatch"
project_copyright = "Widebatch's authors; Apache-2.0"
release = version = version_of("widebatch")

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
smartquotes = False  # it makes dashes of `--`

html_theme = "furo"
html_title = "Widebatch"
html_static_path = ["_static"]
html_css_files = ["widebatch.css"]
html_show_sphinx = False
html_copy_source = False
# Summaries of search results are fetched, which browsers refuse for pages opened from a folder.
html_show_search_summary = False
html_theme_options = {"sidebar_hide_name": False}


class ConsoleLexer(Lexer):
    """``console`` blocks: a session where a line begins with ``$``, commands alone elsewhere."""

    name = "Console"
    aliases: ClassVar[list[str]] = ["console"]

    def get_tokens_unprocessed(self, text: str) -> Any:
        """Pygments' own tokens, by the lexer that fits."""
        is_session = text.startswith("$ ") or "\n$ " in text
        lexers = pygments.lexers.shell
        lexer = (lexers.BashSessionLexer if is_session else lexers.BashLexer)(stripnl=False)
        return lexer.get_tokens_unprocessed(text)


def setup(app: Any) -> None:
    """Called by Sphinx: write the reference before the pages are read."""
    app.add_lexer("console", ConsoleLexer)
    app.connect("builder-inited", lambda _: reference_pages.write(HERE / "reference"))
