"""A real Chromium for the tests that use the page."""

import shutil

import pytest


@pytest.fixture(scope="session")
def chromium():
    """Debian's `chromium` or another Chromium on the PATH; without one the tests are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
