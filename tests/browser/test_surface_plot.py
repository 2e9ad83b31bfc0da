"""Pictures to be turned and read, in a real browser: drawn, turned, read by pointer and keys, and still there where nothing turns."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lineament.papers import search
from lineament.report.gallery import build
from tests.browser import samples
from tests.browser.chrome import OURS, evaluate, running_scripts, scrolls_sideways, settle, watch

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return samples.report(tmp_path_factory.mktemp("report"))


def plot(driver, kind: str):
    found = driver.find_element("css selector", f".plot[data-kind='{kind}']")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def pixels(element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(int)


def colourful(element) -> bool:
    """Viridis goes through blue, green and yellow: a blank or a broken drawing has hardly any colour."""
    shown = pixels(element).reshape(-1, 3)
    coloured = (shown.max(1) - shown.min(1) > 60).mean()
    return bool(coloured > 0.05) and len(np.unique(shown // 16, axis=0)) > 12


def reading(driver) -> str:
    return evaluate(driver, "document.querySelector('.reading').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_both_drawings_have_colours_and_fit(browser, report, width, scheme):
    from selenium.webdriver.support.ui import WebDriverWait

    driver = browser(width=width, scheme=scheme)
    watch(driver, report)
    for kind in ("contour", "surface"):
        # A busy machine shows the canvas some frames after the page is loaded.
        WebDriverWait(driver, 20).until(lambda _, kind=kind: colourful(plot(driver, kind)), kind)
    assert not scrolls_sideways(driver)
    inside = evaluate(
        driver,
        "[...document.querySelectorAll('.plot:not([hidden])')].every(p => p.getBoundingClientRect().right <= innerWidth + 1)",
    )
    assert inside


def test_the_drawing_stands_in_the_still_pictures_place_and_gives_it_back(browser, report):
    driver = browser()
    watch(driver, report)
    seen = "document.querySelector('figure:has(.surface-plot) .still').getClientRects().length"
    assert evaluate(driver, seen) == 0
    driver.find_element("css selector", ".swap").click()
    assert evaluate(driver, seen) == 1
    assert not evaluate(driver, "document.querySelector('.plot').getClientRects().length")
    driver.find_element("css selector", ".swap").click()
    assert evaluate(driver, seen) == 0


def test_the_keyboard_turns_the_surface_and_reads_the_contours(browser, report):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver = browser()
    watch(driver, report)
    surface = plot(driver, "surface")
    before = pixels(surface)
    driver.execute_script("arguments[0].focus()", surface)
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT * 4).perform()
    assert np.abs(pixels(surface) - before).mean() > 1
    eye = "document.querySelector('.plot[data-kind=surface]').layout.scene.camera.eye"
    assert evaluate(driver, f"{eye}.x") != pytest.approx(1.35, abs=0.05)
    driver.find_element("css selector", ".reset").click()
    assert evaluate(driver, "new Promise(r => setTimeout(() => r(1), 500))") == 1
    assert evaluate(driver, f"{eye}.x") == pytest.approx(1.35)

    driver.execute_script("arguments[0].focus()", plot(driver, "contour"))
    # From the middle of 9 by 11 places on [-1, 1] x [-2, 2]: one to the right, two up.
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_UP).perform()
    assert evaluate(driver, "new Promise(r => setTimeout(() => r(1), 200))") == 1
    assert reading(driver) == "loss 0.3825 at 0.250, 0.800"


def test_the_pointer_reads_both(browser, report):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = browser()
    watch(driver, report)
    for kind in ("contour", "surface"):
        driver.execute_script("document.querySelector('.reading').textContent = ''")
        ActionChains(driver).move_to_element_with_offset(plot(driver, kind), -10, 20).pause(
            0.3
        ).move_by_offset(4, 4).pause(0.5).perform()
        assert reading(driver).startswith("loss ") and " at " in reading(driver), kind


def test_words_from_users_do_nothing_in_a_drawing(browser, report):
    from selenium.webdriver.support.select import Select

    driver = browser()
    watch(driver, report)
    for choice in range(3):
        Select(driver.find_element("css selector", ".surface-plot select")).select_by_index(choice)
        assert evaluate(driver, "new Promise(r => setTimeout(() => r(1), 800))") == 1
        assert driver.title.startswith("What a small network")
        assert (
            evaluate(driver, "document.querySelectorAll('.plot a, .plot img, .plot [onerror]').length") == 0
        )
    # The last has no second coordinate: a curve, whose label is shown as it was written.
    assert evaluate(driver, "document.querySelector('.plot[data-kind=surface]').hidden")
    assert "%{z} <b>loss</b>" in evaluate(
        driver, "document.querySelector('.plot[data-kind=curve]').textContent"
    )
    assert set(running_scripts(driver)) == OURS
    loud = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert loud == []


def test_colours_follow_the_scheme_while_the_page_is_open(browser, report):
    driver = browser(scheme="light")
    watch(driver, report)
    ink = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    light = evaluate(driver, ink)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert evaluate(driver, "new Promise(r => setTimeout(() => r(1), 800))") == 1
    assert evaluate(driver, ink) != light


@pytest.mark.parametrize("scripts", [True, False])
def test_where_nothing_turns_the_still_picture_stays(browser, report, scripts):
    driver = browser(scripts=scripts)
    blind = "HTMLCanvasElement.prototype.getContext = () => null"
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": blind})
    try:
        watch(driver, report)
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert evaluate(
        driver, "[...document.querySelectorAll('.still')].every(s => s.getClientRects().length === 1)"
    )
    assert evaluate(driver, "[...document.querySelectorAll('.surface-plot, .plot, .swap')].every(e => !e.getClientRects().length)")  # fmt: skip
    said = "This browser shows no WebGL" in evaluate(driver, "document.body.innerText")
    assert said == scripts


def test_paper_prints_the_still_picture(browser, report):
    driver = browser()
    watch(driver, report)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = "[document.querySelector('figure:has(.surface-plot) .still'), document.querySelector('.surface-plot')].map(e => e.getClientRects().length)"
        assert evaluate(driver, shown) == [1, 0]
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_gallery_turns_them_too(browser, tmp_path):
    catalogue = [paper.to_dict() for paper in search()]
    site = build(samples.runs(tmp_path / "runs"), tmp_path / "site", catalogue=catalogue).index.parent
    driver = browser()
    watch(driver, site / "papers/neural-collapse.html")
    settle(driver)
    assert evaluate(driver, "document.querySelector('[data-surface-plot]').dataset.surfacePlot") == "drawn"
    assert pixels(plot(driver, "surface")).std() > 5
    assert set(running_scripts(driver)) == OURS
    watch(driver, site / "papers/ssa.html")
    assert running_scripts(driver) == []
