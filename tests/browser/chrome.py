"""What a browser test does with a driver: open a page and watch it, look at its pictures, press Tab through it."""

from __future__ import annotations

import hashlib
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs


def watch(driver: Any, page: str | Path) -> None:
    """Open a page from disk and scroll to its end; no console message of weight, no request that leaves the disk."""
    driver.get(Path(page).resolve().as_uri())
    load_pictures(driver)
    settle(driver)
    loud = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    loud = [entry for entry in loud if ADVICE not in entry["message"]]
    assert loud == []
    asked = requests(driver)
    assert asked, "the network log is empty, so this test would see nothing"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def requests(driver: Any) -> list[str]:
    """The addresses asked for since the last look, from the browser's network log."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def evaluate(driver: Any, expression: str) -> Any:
    """The value of an expression; works also where the page's own scripts are switched off."""
    answer = driver.execute_cdp_cmd(
        "Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True}
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


def settle(driver: Any, seconds: float = 30.0) -> None:
    """Wait until every picture that can be turned is drawn or has said why not; without scripts there is nothing to wait for."""
    end = time.monotonic() + seconds
    while driver.scripts and evaluate(
        driver, """document.querySelectorAll('[data-surface-plot=""]').length"""
    ):
        assert time.monotonic() < end, "a picture that can be turned is still not drawn"
        time.sleep(0.05)


def running_scripts(driver: Any) -> list[str]:
    """The SHA-256 of each script that the browser runs (data in a script element is none)."""
    words = evaluate(
        driver,
        """[...document.scripts].filter(s => !s.type || /javascript|module/i.test(s.type)).map(s => s.src || s.textContent)""",
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in words]


def load_pictures(driver: Any) -> None:
    """Wait until every picture is decoded; lazy ones are asked for."""
    evaluate(
        driver,
        "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); }))"
        ".then(() => 1)",
    )


def pictures(driver: Any) -> list[dict[str, Any]]:
    """Each picture's natural width, alternative text and the source that was chosen."""
    return evaluate(
        driver,
        "[...document.images].map(i => ({width: i.naturalWidth, alt: i.alt, source: i.currentSrc}))",
    )


def scrolls_sideways(driver: Any) -> bool:
    """Whether the page as a whole is wider than the window."""
    return evaluate(driver, "document.documentElement.scrollWidth > document.documentElement.clientWidth")


def tab_through(driver: Any, most: int = 400) -> list[dict[str, Any]]:
    """Press Tab through the whole page; what had the focus, and whether one could see so."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    stops: list[dict[str, Any]] = []
    for _ in range(most):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        stop = evaluate(
            driver,
            """(() => { const e = document.activeElement; if (!e || e === document.body) return null;
            const s = getComputedStyle(e);
            const all = [...document.querySelectorAll('*')];
            return {index: all.indexOf(e), tag: e.tagName, text: (e.textContent || e.name || '').trim().slice(0, 60),
                    visible: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2}; })()""",
        )
        if stop is None or (stops and stop["index"] == stops[0]["index"]):
            break
        stops.append(stop)
    return stops


def reachable(driver: Any) -> list[int]:
    """The places of everything that a keyboard must reach: links, fields, buttons, scrolling regions."""
    return evaluate(
        driver,
        """(() => { const all = [...document.querySelectorAll('*')];
        return [...document.querySelectorAll('a[href], input, select, button, summary, [tabindex="0"]')]
          .filter(e => e.getClientRects().length).map(e => all.indexOf(e)); })()""",
    )


_script = files("lineament.report") / "templates" / "surface_plot.js"
# The only scripts that a report runs: the drawing library, and what uses it.
OURS = {hashlib.sha256(text.encode()).hexdigest() for text in (get_plotlyjs(), _script.read_text("utf-8"))}

# What Chromium says of how plotly draws letters on a canvas, which is neither an error nor ours.
ADVICE = "Canvas2D: Multiple readback operations using getImageData"

# What users have called their classes, files and models.
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "quote ' and \" and & and `",
    "bell \x07 escape \x1b[31m null \x00",
    "right-to-left \u202e override and \u2066 isolate",
    "عربي עברית 漢字 ñ é 😀",
    "{{ 7 * 7 }} {% raw %} $x^2$",
    "lone surrogate \udcff",
    "W" * 300,
    "javascript:document.title='owned'",
    "",
)
