"""A real Chromium over ``file://``: fixtures that the report's, the gallery's and the audit's browser tests share.

What a test does with a driver (open and watch a page, press Tab through it) is in ``chrome.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def _binary(variable: str, *names: str) -> str | None:
    return os.environ.get(variable) or next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def _drivers() -> Iterator[Callable[[bool], Any]]:
    """One Chromium with scripts and one without, started when first asked for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = _binary("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    chromedriver = _binary("CHROMEDRIVER", "chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("Chromium and chromedriver are not installed")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    started: dict[bool, Any] = {}

    def start(scripts: bool) -> Any:
        if scripts not in started:
            options = Options()
            options.binary_location = chromium
            for argument in (
                "--headless=new",
                "--no-sandbox",
                # WebGL by software, which a machine without a graphics card has too.
                "--use-gl=angle",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--hide-scrollbars",
            ):
                options.add_argument(argument)
            if not scripts:
                prefs = {"profile.managed_default_content_settings.javascript": 2}
                options.add_experimental_option("prefs", prefs)
            options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
            started[scripts] = webdriver.Chrome(options=options, service=Service(chromedriver))
            started[scripts].scripts = scripts
        return started[scripts]

    yield start
    for driver in started.values():
        driver.quit()


@pytest.fixture
def browser(_drivers: Callable[[bool], Any]) -> Callable[..., Any]:
    """A function that gives a driver: ``browser(width=390, scheme="dark", scripts=False)``."""

    def get(width: int = 1280, height: int = 900, scheme: str = "light", scripts: bool = True) -> Any:
        driver = _drivers(scripts)
        driver.get("about:blank")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        return driver

    return get
