"""A comparison of two networks on hostile files, read in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lineament import compare
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
]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 3)
    ).eval()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two untrained networks on a folder of images whose classes and groups have hostile names."""
    root = tmp_path_factory.mktemp("compared")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (root / "images" / name).mkdir(parents=True)
        for index in range(14):
            picture = Image.fromarray(rng.integers(0, 200, (10, 10), dtype=np.uint8))
            picture.save(root / "images" / name / f"<img src=x onerror=alert({index})>.png")
    np.save(root / "groups.npy", np.array([NAMES[i % 2] for i in range(42)]))
    found = compare(
        network(0), network(1), str(root / "images"), out=root / "out", groups=str(root / "groups.npy")
    )
    assert {section.name for section in found.sections if section.status == "failed"} == set()
    return found.html


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_hostile_names_are_shown_and_do_nothing(browser, page, width, scheme):
    driver = browser(width=width, scheme=scheme)
    watch(driver, page)
    assert "owned" not in driver.title
    assert not scrolls_sideways(driver)
    shown = pictures(driver)
    assert len(shown) >= 4 and all(picture["width"] > 0 and picture["alt"] for picture in shown)
    assert evaluate(driver, "document.querySelectorAll('[onload],[onerror]').length") == 0
    assert set(running_scripts(driver)) <= OURS
    words = evaluate(driver, "document.body.innerText")
    for part in ("<script>document.title='owned'<&>", "\"quoted\" 'names' onload=alert(1)", "\\x1b[31mred\\x07\\tand tab"):  # fmt: skip
        assert part in words


def test_the_keyboard_walks_the_whole_page(browser, page):
    driver = browser()
    watch(driver, page)
    stops = tab_through(driver)
    assert len(stops) > 5 and all(stop["visible"] for stop in stops)
