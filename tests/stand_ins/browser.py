"""A Chromium for tests of pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launched() -> Iterator[Any]:
    """A browser: playwright's own Chromium, that of D2M_CHROMIUM, or one that is installed."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright: pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [os.environ.get("D2M_CHROMIUM"), own, *map(shutil.which, CHROMIUM)]
        path = next((path for path in found if path and Path(path).is_file()), None)
        if path is None:
            pytest.skip("no Chromium: install one, or name it in D2M_CHROMIUM")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
