"""A whole audit of hostile files, read in a real browser: names are shown, and do nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lineament.audit.run import audit
from tests.browser.chrome import (
    OURS,
    evaluate,
    pictures,
    running_scripts,
    scrolls_sideways,
    tab_through,
    watch,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = [
    "<script>document.title='owned'<&>",
    "\"quoted\" 'names' onload=alert(1)",
    "\x1b[31mred\x07\tand tab",
    "\u202egnp.esrever\u2066",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report on a folder of images whose class folders have hostile names, by a network trained on them."""
    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "images" / name).mkdir(parents=True)
        for index in range(20):
            picture = rng.integers(0, 90, (12, 12), dtype=np.uint8)
            picture[3 * number : 3 * number + 3] += 120
            Image.fromarray(picture).save(root / "images" / name / f"<img src=x onerror=alert({index})>.png")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 4)
    ).eval()
    groups = np.array([NAMES[i % 2] for i in range(80)])
    np.save(root / "groups.npy", groups)
    found = audit(model, str(root / "images"), out=root / "report", groups=str(root / "groups.npy"))
    assert {section.name for section in found.sections if section.status == "failed"} == set()
    return found.html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_names_do_nothing(browser, page, width, scheme):
    driver = browser(width=width, scheme=scheme)
    watch(driver, page)
    assert "owned" not in driver.title
    assert not scrolls_sideways(driver)
    shown = pictures(driver)
    assert len(shown) >= 10 and all(picture["width"] > 0 and picture["alt"] for picture in shown)
    assert evaluate(driver, "document.querySelectorAll('[onload],[onerror]').length") == 0
    assert set(running_scripts(driver)) <= OURS


def test_hostile_names_are_shown(browser, page):
    driver = browser()
    watch(driver, page)
    words = evaluate(driver, "document.body.innerText")
    for part in ("<script>document.title='owned'<&>", "\"quoted\" 'names' onload=alert(1)", "\\x1b[31mred\\x07\\tand tab", "\\u202egnp.esrever\\u2066"):  # fmt: skip
        assert part in words
    text = page.read_text(encoding="utf-8")
    assert not set("\x1b\x07\u202e\u2066") & set(text)


def test_the_keyboard_walks_the_whole_report(browser, page):
    driver = browser()
    watch(driver, page)
    stops = tab_through(driver)
    assert len(stops) > 5 and all(stop["visible"] for stop in stops)


def test_on_a_phone_the_names_of_tables_are_whole_and_a_shade_says_that_more_follows(browser, page):
    driver = browser(width=390)
    watch(driver, page)
    edges = evaluate(
        driver, "[...document.querySelectorAll('caption .name')].map(e => e.getBoundingClientRect().right)"
    )
    assert edges and max(edges) <= 390
    shades = evaluate(
        driver,
        "[...document.querySelectorAll('.scroll')].map(b => getComputedStyle(b).backgroundAttachment)",
    )
    assert set(shades) == {"local, local, scroll, scroll"}


def test_on_a_desk_the_tables_of_the_lenses_are_whole(browser, page):
    driver = browser(width=1280)
    watch(driver, page)
    wide = evaluate(
        driver,
        "[...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth)"
        ".map(b => b.getAttribute('aria-label'))",
    )
    # The scores of maps, the simple attributes and the features have six to ten columns of words, which no page this wide holds.
    assert [
        name
        for name in wide
        if not name.startswith(
            ("Table: Maps judged", "Table: Simple attributes", "Table: Features, the simplest first")
        )
    ] == []
