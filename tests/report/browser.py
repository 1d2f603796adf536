"""A real Chromium for the report's pages: Debian's, driven by Playwright."""

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")

needs_browser = pytest.mark.skipif(
    not CHROMIUM or not importlib.util.find_spec("playwright"),
    reason="no browser here: apt-get install --no-install-recommends chromium, and"
    " pip install -r requirements-bench.lock; `make test-all` does both",
)


@contextlib.contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser without windows."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers do not give; all pages here are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(
    browser: "Browser", url: str, excused: str = "nothing", **context: Any
) -> Iterator["Page"]:
    """A page in a context of its own; fails on any message, error or foreign request of it.

    Args:
        browser: the browser.
        url: of the page.
        excused: messages with this text do not matter.
        context: settings of the browser's context.
    """
    problems: list[str] = []
    with contextlib.closing(browser.new_context(**context)) as surroundings:
        page = surroundings.new_page()
        page.set_default_timeout(180_000)  # machines that test are busy
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("data:", url))
                or problems.append(f"asked for {request.url}")
            ),
        )
        page.goto(url)
        yield page
        problems = [text for text in problems if excused not in text]
        assert not problems, problems
