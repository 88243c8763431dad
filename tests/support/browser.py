"""A real Chromium for tests of what people see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")


@contextlib.contextmanager
def new_page(**options: Any) -> Iterator[Any]:
    """A playwright page; `options` as of `Browser.new_page`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser.new_page(**options)
        finally:
            browser.close()


def complaints_of(page: Any) -> list[str]:
    """Return a list that collects the page's console messages, dialogs and requests; empty for a good page."""
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: (found.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: found.append(request.url) if request.url[:4] == "http" else None)
    return found
