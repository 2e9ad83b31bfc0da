"""What a browser test does with a driver: open a page and watch it, look at its pictures, press Tab through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def watch(driver: Any, page: str | Path) -> None:
    """Open a page from disk and scroll to its end; no console message of weight, no request that leaves the disk."""
    driver.get(Path(page).resolve().as_uri())
    load_pictures(driver)
    loud = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
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
