"""The report's strings, figures and page: hostile words shown harmlessly, equal input gives equal bytes."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.browser.chrome import HOSTILE

from lineament.core.checks import InputError
from lineament.report import figures, page, text, token_page
from lineament.report.outcome import Table
from lineament.report.page import STATES
from lineament.report.section import Finding, Section


class Reader(HTMLParser):
    """What a browser makes of the page: its tags in order, and the text of each."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def section(name: str = "one", **changes) -> Section:
    fields = {"title": "Title", "status": "note", "number": "1", "unit": "thing", "sentence": "A sentence."}
    return Section(name, **{**fields, **changes})


def render(sections=(), findings=(), **changes) -> str:
    return page.render(
        "T", "S", [("fact", 1)], list(findings), list(sections), command="lineament audit", **changes
    )


@given(st.text(st.characters()))
def test_printable_text_can_be_written_anywhere(word):
    shown = text.printable(word)
    assert shown.encode("utf-8").decode() == shown
    assert shown.isprintable() or all(c.isprintable() or c.isspace() or ord(c) > 0x2FF for c in shown)
    assert not set(shown) & {chr(c) for c in (*range(32), 0x7F, 0x202E, 0x2066, 0x200F, 0xFEFF)}
    ElementTree.fromstring(f"<a>{shown.replace('&', '').replace('<', '')}</a>")
    assert text.printable(shown) == shown


def test_printable_leaves_every_script_alone():
    for word in ("naïve", "漢字", "עברית", "😀", "a b", "$x$", "tab? no"):
        assert text.printable(word) == word
    assert text.printable("a\nb", keep="\n") == "a\nb"
    assert text.printable("a\nb") == "a\\nb"
    assert [len(text.printable("x" * n, limit=5)) for n in (4, 5, 6, 60)] == [4, 5, 5, 5]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (-3, "−3"), (2.0, "2"), (-0.5, "−0.5"), (1e-9, "1e-09"), (math.inf, "∞"), (-math.inf, "−∞"), (False, "no")],
)  # fmt: skip
def test_cells(value, shown):
    assert text.cell(value) == shown


def test_duration_never_says_sixty_seconds():
    assert [text.duration(s) for s in (59.97, 119.9, 3599.9, math.nan, -1)] == [
        "1 min 0 s", "2 min 0 s", "1 h 0 min", "–", "–",
    ]  # fmt: skip


def test_plain_is_strict_json():
    value = {
        1: [math.nan, np.float32(0.5), np.arange(2)],
        "t": torch.ones(1, requires_grad=True),
        "s": "\udcff",
        "x": {3},
    }
    assert json.loads(json.dumps(text.plain(value), allow_nan=False)) == {
        "1": [None, 0.5, [0, 1]], "t": [1.0], "s": "\\udcff", "x": [3],
    }  # fmt: skip


def draw_hostile(ax):
    ax.bar(range(len(HOSTILE)), range(len(HOSTILE)), tick_label=list(HOSTILE))
    ax.set_title("$\\frac{unclosed")


def test_a_figure_is_well_formed_and_the_same_every_time():
    one, two = (figures.picture(draw_hostile, alt="bars", caption="c") for _ in range(2))
    assert (one.light, one.dark) == (two.light, two.dark)
    for data in (one.light, one.dark):
        root = ElementTree.fromstring(data)
        assert root.tag.endswith("svg")
        assert b"<!--" not in data and b"date" not in data and b"<text" not in data


def test_each_theme_has_its_own_page_and_colours():
    seen = []
    shown = figures.picture(lambda ax: seen.append(ax.plot([0, 1])[0].get_color()), alt="line", caption="")
    assert seen == [figures.THEMES["light"]["cycle"][0], figures.THEMES["dark"]["cycle"][0]]
    for data, theme in ((shown.light, "light"), (shown.dark, "dark")):
        assert figures.THEMES[theme]["page"].encode() in data


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    matplotlib.rcParams["font.size"] = 23.0
    try:
        before = dict(matplotlib.rcParams)
        with pytest.raises(ZeroDivisionError):
            figures.picture(lambda ax: 1 / 0, alt="none", caption="")
        plain = figures.picture(lambda ax: ax.set_title("x"), alt="t", caption="")
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()
    # What the user set for their own plots does not reach the report.
    assert figures.picture(lambda ax: ax.set_title("x"), alt="t", caption="").light == plain.light


def test_panels_and_png():
    shapes = []
    shown = figures.picture(
        lambda axes: shapes.append(axes.shape), alt="x", caption="", kind="png", panels=(2, 3)
    )
    assert shapes == [(2, 3), (2, 3)]
    assert shown.light.startswith(b"\x89PNG") and shown.light != shown.dark


def test_log_axes_are_labelled_without_mathtext():
    labels = {}

    def draw(ax, low=1e-8):
        ax.plot([1, 2], [low, 1])
        ax.set_yscale("log")
        labels[low] = ax

    figures.picture(draw, alt="x", caption="")
    words = [t.get_text() for t in labels[1e-8].get_yticklabels()]
    assert "10⁻⁴" in words and not any("$" in word for word in words)
    figures.picture(lambda ax: draw(ax, 0.5), alt="x", caption="")
    minor = [t.get_text() for t in labels[0.5].yaxis.get_minorticklabels()]
    assert "0.6" in minor and not any("$" in word for word in minor)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_words_stand_out_from_their_page(theme):
    colours = figures.THEMES[theme]

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour):
        a, b = sorted((luminance(colour), luminance(colours["page"])), reverse=True)
        return (a + 0.05) / (b + 0.05)

    assert min(contrast(colour) for colour in colours["cycle"]) >= 3
    assert min(contrast(colours["ink"]), contrast(colours["muted"])) >= 4.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alt": " "}, "alt"),
        ({"kind": "gif"}, "kind"),
        ({"size": (0, 1)}, "size"),
        ({"panels": (0, 1)}, "panels"),
    ],
)
def test_a_figure_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        figures.picture(lambda ax: None, **{"alt": "x", "caption": "", **changes})


def test_save_writes_both_and_refuses_paths(tmp_path):
    shown = figures.picture(lambda ax: ax.plot([1, 2]), alt="a", caption="b")
    figure = figures.save(shown, tmp_path, "curve")
    assert (figure.file, figure.alt, figure.caption) == ("curve.svg", "a", "b")
    assert (tmp_path / "curve.svg").read_bytes() == shown.light
    assert (tmp_path / "curve-dark.svg").read_bytes() == shown.dark
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(InputError):
            figures.save(shown, tmp_path, name)


def test_the_page_escapes_every_field():
    word = "<i a='\"&\x1b\u202e\udcff"
    table = Table(word, [word, word], [[word, word]])
    shown = figures.picture(lambda ax: None, alt=word, caption=word)
    html = page.render(
        word, word, [(word, word)], [Finding("note", word, "x")],
        [section("x", title=word, number=word, unit=word, sentence=word, pictures=[shown], tables=[table], method=word)],
        command=word, versions={word: word}, kicker=word,
        methods={word: {"title": word, "year": word, "url": word}},
    )  # fmt: skip
    reader = Reader(html)
    assert not reader.all("i") and not reader.all("script")
    assert not set(html) & {"\x1b", "\u202e", "\udcff"}
    harmless = "<i a='\"&\\x1b\\u202e\\udcff"
    assert sum(harmless in data for data in reader.words) >= 15
    assert reader.all("img")[0]["alt"] == harmless


def test_the_page_asks_for_nothing_and_needs_no_script():
    html = render([section(pictures=[figures.picture(lambda ax: None, alt="x", caption="")])])
    reader = Reader(html)
    policy = next(a for a in reader.all("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in (policy["content"] or "") and "script" not in (policy["content"] or "")
    addresses = [v for _, a in reader.tags for k, v in a.items() if k in ("src", "srcset", "href")]
    assert addresses and all(v and v.startswith(("data:", "#")) for v in addresses)
    assert not re.search(r"url\(|@import", html)
    assert reader.all("source")[0]["media"] == "screen and (prefers-color-scheme: dark)"


def test_pictures_arrive_as_they_are():
    shown = figures.picture(lambda ax: None, alt="x", caption="", kind="png")
    reader = Reader(render([section(pictures=[shown])]))
    for tag, key, data in (("img", "src", shown.light), ("source", "srcset", shown.dark)):
        address = reader.all(tag)[0][key] or ""
        assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == data


def test_the_verdict_comes_first_and_worst_first():
    html = render(
        [section()],
        [
            Finding("good", "G1"),
            Finding("warning", "W1"),
            Finding("note", "N1", "one"),
            Finding("warning", "W2"),
        ],
    )
    places = [html.index(f"<p>{word}") for word in ("W1", "W2", "N1", "G1")]
    assert places == sorted(places)
    assert places[-1] < html.index('id="contents-title"') < html.index('id="section-1"')
    assert html.count('href="#section-1"') == 2


def test_a_finding_says_what_to_do_where_there_is_something():
    html = render([section()], [Finding("warning", "W", advice="Do <this>."), Finding("good", "G")])
    assert html.count("What to do:") == 1 and "Do &lt;this&gt;." in html
    assert html.index("<p>W") < html.index("What to do:") < html.index("<p>G")


def test_what_was_decided_on_the_way_is_said_and_escaped(tmp_path):
    assert "What was decided" not in render()
    html = render([section()], notes=["Colour <b> as grey."])
    assert "What was decided on the way" in html and "Colour &lt;b&gt; as grey." in html
    page.write(tmp_path, "T", "S", [], [], [section()], command="x", notes=["Colour as grey."])
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == ["Colour as grey."]


def test_what_does_not_apply_took_no_time():
    done = replace(section(name="other", status="good", method=""), seconds=2.0)
    html = render([section(status="skipped", method=""), done])
    assert html.count("Took ") == 1 and "in 2.0 s" in html
    assert "Took " not in render([section(name="other", status="good", method="")]), "a time nobody took"


def test_headings_are_in_order_and_tables_have_scopes():
    html = render([section(tables=[Table("t", ["a", "b"], [["x", 1], ["y", None]])])], [Finding("note", "n")])
    levels = [int(tag[1]) for tag, _ in Reader(html).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    scopes = [a["scope"] for a in Reader(html).all("th")]
    assert scopes == ["col", "col", "row", "row"]
    assert [a["class"] for a in Reader(html).all("td")] == ["number", "number"]


@pytest.mark.parametrize("status", list(STATES))
def test_a_state_is_a_word(status):
    words = "".join(Reader(render([section(status=status)])).words)
    assert words.count(STATES[status][0]) >= 2


def test_empty_things_say_so_and_nothing_is_broken():
    assert "Nothing was looked at" in render()
    assert "Nothing stood out" in render([section()])
    html = render([section(number="", unit="", sentence="", status="failed", tables=[Table("", [], [])])])
    assert "left no message" in html and "<table" not in html and "Without an answer" in html
    assert "<caption" not in render([section(tables=[Table("", ["a"], [])])])
    for html in (render(), render([section()])):
        assert "None" not in "".join(Reader(html).words) and "Undefined" not in html


def test_ragged_rows_are_shown():
    words = "".join(Reader(render([section(tables=[Table("t", ["a"], [["x", "extra"], []])])])).words)
    assert "extra" in words


def test_bad_findings_and_names_are_refused():
    with pytest.raises(InputError, match=r"severity.*nearest: 'warning'"):
        render(findings=[Finding("warnin", "x")])
    with pytest.raises(InputError, match="more than once"):
        render([section(), section()])


def test_write_is_whole_and_strict(tmp_path):
    made = section(numbers={"a": math.nan, "b": np.float64(1.5)}, seconds=0.5)
    html, record = page.write(
        tmp_path, "T\udcff", "", [("n", 1)], [Finding("note", "x")], [made], command="c", extra={"seed": 3}
    )
    raw = json.loads(record.read_text(encoding="utf-8"))
    assert list(raw) == [
        "title",
        "subtitle",
        "command",
        "facts",
        "findings",
        "sections",
        "versions",
        "notes",
        "seed",
    ]
    assert raw["sections"][0]["numbers"] == {"a": None, "b": 1.5}
    assert raw["sections"][0]["title"] == "Title"
    assert html.read_text(encoding="utf-8").endswith("</html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_tokens_that_decide_are_named_in_words_and_the_legend_fits():
    def tokens(**changes):
        block = token_page.TokenBlock(
            " are", "line", ["<i>", " keys", " on"], [0.1, 0.9, -0.4], [True] * 3, **changes
        )
        return token_page.render("t", "", [], [block], command="c")

    page_text = tokens()
    assert "Most for it: “ keys” (0.9), then “&lt;i&gt;” (0.1). Most against it: “ on” (−0.4)." in page_text
    assert "rationale" not in page_text and "(the rationale)" in tokens(marked=(1,))
