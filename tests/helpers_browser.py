"""A real browser for the tests: Chromium through playwright, where both are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
SHOWS = "([where, text]) => document.querySelector(where)?.innerText.includes(text)"


@contextmanager
def page(address: str, width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """An open page that reaches nothing but this machine (a route would lose the bodies of
    uploads); skips the test where there is no browser.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.goto(address, timeout=120_000)
        yield opened
        browser.close()


def wait_for_text(opened: Any, where: str, text: str, timeout: float = 300_000) -> None:
    """Until the element at this selector shows the text."""
    opened.wait_for_function(SHOWS, arg=[where, text], timeout=timeout)
