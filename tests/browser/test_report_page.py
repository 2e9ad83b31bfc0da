"""The report in a real browser: from disk, without network or script, on phones and desks, by day and by night."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineament.report.page import write
from lineament.report.section import Section
from tests.browser import samples
from tests.browser.chrome import evaluate, pictures, reachable, scrolls_sideways, tab_through, watch

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return samples.report(tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_opens_quietly_and_fits(browser, report, width, scheme):
    driver = browser(width=width, scheme=scheme)
    watch(driver, report)
    assert evaluate(driver, "innerWidth") == width
    assert not scrolls_sideways(driver)
    shown = pictures(driver)
    assert len(shown) == 5
    assert all(picture["width"] > 0 and picture["alt"] for picture in shown)
    assert driver.title.startswith("What a small network relies on")


def test_pictures_follow_the_scheme(browser, report):
    sources = {}
    for scheme in ("light", "dark"):
        driver = browser(scheme=scheme)
        watch(driver, report)
        sources[scheme] = [picture["source"] for picture in pictures(driver)]
    assert all(light != dark for light, dark in zip(sources["light"], sources["dark"]))


def test_reads_without_scripts(browser, report):
    driver = browser(scripts=False)
    watch(driver, report)
    words = evaluate(driver, "document.body.innerText")
    for sentence in ("It relies on the mark", "Does not apply: the network", "The lens failed"):
        assert sentence in words
    assert all(picture["width"] > 0 for picture in pictures(driver))


def test_the_keyboard_reaches_everything_and_one_sees_where(browser, report):
    driver = browser()
    watch(driver, report)
    stops = tab_through(driver)
    assert stops[0]["text"] == "Skip to the verdict"
    assert set(reachable(driver)) <= {stop["index"] for stop in stops}
    assert [stop["text"] for stop in stops if not stop["visible"]] == []


def test_tables_scroll_inside_their_own_box(browser, report):
    driver = browser(width=390)
    watch(driver, report)
    boxes = evaluate(
        driver,
        "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth, b.tabIndex])",
    )
    assert [True, 0] in boxes


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_page(browser, report, scheme):
    driver = browser(scheme=scheme)
    watch(driver, report)
    faint = evaluate(
        driver,
        """(() => {
        const rgb = c => c.match(/[\\d.]+/g).map(Number);
        const lum = c => { const l = rgb(c).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
        const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (rgb(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
        return [...document.body.querySelectorAll('*')]
          .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
          .map(e => { const [a, b] = [lum(getComputedStyle(e).color), lum(ground(e))].sort((x, y) => y - x);
                      return [(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40)]; })
          .filter(pair => pair[0] < 4.5); })()""",
    )
    assert faint == []


def test_an_empty_report_opens(browser, tmp_path):
    page, _ = write(tmp_path, "Nothing", "", [], [], [], command="lineament audit")
    driver = browser(width=390)
    watch(driver, page)
    assert "Nothing was looked at" in evaluate(driver, "document.body.innerText")


def test_one_very_long_word_does_not_widen_the_page(browser, tmp_path):
    word = "x" * 2000
    section = Section("a", word, "warning", word, word, word, method=word)
    page, _ = write(tmp_path, word, word, [(word, word)], [], [section], command=word)
    driver = browser(width=390)
    watch(driver, page)
    assert not scrolls_sideways(driver)
