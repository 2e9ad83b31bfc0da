"""The gallery in a real browser: search, filters, pictures and keyboard, all from disk; hostile runs do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineament.papers import search
from lineament.report.gallery import build
from tests.browser import samples
from tests.browser.chrome import evaluate, pictures, reachable, scrolls_sideways, tab_through, watch

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gallery")
    catalogue = [paper.to_dict() for paper in search()]
    return build(samples.runs(root / "runs"), root / "site", catalogue=catalogue).index.parent


def shown(driver) -> list[str]:
    return evaluate(
        driver,
        "[...document.querySelectorAll('[data-entry]')].filter(e => e.getClientRects().length)"
        ".map(e => e.dataset.words.split(' ')[0])",
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "page", ["index.html", "papers/neural-collapse.html", "papers/other-1.html", "papers/ssa.html"]
)
def test_pages_open_quietly_and_fit(browser, site, page, width, scheme):
    driver = browser(width=width, scheme=scheme)
    watch(driver, site / page)
    assert not scrolls_sideways(driver)
    assert driver.title != "owned"
    assert all(picture["width"] > 0 and picture["alt"] for picture in pictures(driver))


def test_a_picture_is_there_and_follows_the_scheme(browser, site):
    for scheme, end in (("light", "1.svg"), ("dark", "1-dark.svg")):
        driver = browser(scheme=scheme)
        watch(driver, site / "papers/neural-collapse.html")
        assert [picture["source"].endswith(end) for picture in pictures(driver)] == [True]


def test_search_finds(browser, site):
    driver = browser()
    watch(driver, site / "index.html")
    every = shown(driver)
    assert len(every) == 30
    field = driver.find_element("id", "search")
    for typed, expected in (
        ("SALIENCY revisiting", ["normgrad"]),
        ("2210.16658", ["neural-collapse"]),
        ("zzz", []),
    ):
        field.clear()
        field.send_keys(typed)
        assert shown(driver) == expected
        tally = evaluate(driver, "document.getElementById('count').textContent")
        assert tally == ("1 paper" if len(expected) == 1 else f"{len(expected)} papers")
        assert evaluate(driver, "document.getElementById('empty').hidden") == bool(expected)
    driver.find_element("css selector", "button[type=reset]").click()
    assert evaluate(driver, "new Promise(r => setTimeout(() => r(1), 50))") == 1
    assert shown(driver) == every


def test_filters_work_together(browser, site):
    from selenium.webdriver.support.select import Select

    driver = browser()
    watch(driver, site / "index.html")
    papers = {paper.slug: paper for paper in search()}
    Select(driver.find_element("id", "wing")).select_by_value("measure")
    assert set(shown(driver)) == {slug for slug, paper in papers.items() if paper.wing == "measure"}
    Select(driver.find_element("id", "year")).select_by_value("2023")
    expected = {slug for slug, paper in papers.items() if paper.wing == "measure" and paper.year == 2023}
    assert expected and set(shown(driver)) == expected
    Select(driver.find_element("id", "year")).select_by_value("")
    Select(driver.find_element("id", "status")).select_by_value("run")
    assert shown(driver) == ["neural-collapse"]


def test_the_catalogue_reads_without_scripts(browser, site):
    driver = browser(scripts=False)
    watch(driver, site / "index.html")
    assert len(shown(driver)) == 30
    assert not evaluate(driver, "document.getElementById('filters').getClientRects().length")


@pytest.mark.parametrize("page", ["index.html", "papers/neural-collapse.html"])
def test_the_keyboard_reaches_everything_and_one_sees_where(browser, site, page):
    driver = browser()
    watch(driver, site / page)
    stops = tab_through(driver)
    assert stops[0]["text"].startswith("Skip to")
    assert set(reachable(driver)) <= {stop["index"] for stop in stops}
    assert [stop["text"] for stop in stops if not stop["visible"]] == []


def test_every_link_between_pages_leads_somewhere(browser, site):
    driver = browser()
    for page in (site / "index.html", *sorted((site / "papers").iterdir())[:4]):
        watch(driver, page)
        links = evaluate(
            driver, "[...document.links].map(a => a.href.split('#')[0]).filter(h => h.startsWith('file:'))"
        )
        assert links
        assert [link for link in links if not Path(link.removeprefix("file://")).is_file()] == []
