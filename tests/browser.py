"""Open a page in headless Chromium: `with opened(path_or_address) as page`.

Console errors, failed requests and uncaught exceptions are collected in `page.errors`; a page file that asks for
anything on the network is an error too. Tests that use it carry `@needs_browser`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
NO_CHROMIUM = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install it or set CHROMIUM=/path/to/it")
# The first two are for containers that run as root; the others keep Chromium from looking for its own services.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    """The mark of a test that opens a page."""
    return pytest.mark.browser(NO_CHROMIUM(test))


@contextmanager
def opened(place: Path | str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator:
    """A playwright page that shows a file or an address.

    Args:
        size: width and height of the window, CSS pixels.

    Yields:
        The page, with one attribute more: `errors`, a list of texts that grows while the page lives.
    """
    from playwright.sync_api import sync_playwright

    is_file = isinstance(place, Path)
    address = place.resolve().as_uri() if is_file else str(place)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            offline=is_file,
        )
        try:
            context.set_default_timeout(180_000)  # a busy machine is no failure
            page = context.new_page()
            page.errors = []
            page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("requestfailed", lambda request: page.errors.append(f"failed: {request.url}"))
            if is_file:
                outside = ("http:", "https:", "ws:", "wss:", "//")
                page.on("request", lambda r: r.url.startswith(outside) and page.errors.append(f"network: {r.url}"))
            page.goto(address)
            yield page
        finally:
            context.close()


def overflow(page) -> int:
    """CSS pixels by which the page is wider than its window; 0 on a page that fits."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
