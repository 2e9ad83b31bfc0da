"""The dashboard's files: bounded, escaped, replaced as a whole, and never beside what is not theirs."""

import json

import pytest

from lineament.core.checks import InputError
from lineament.report.dashboard import LARGEST, FeatureCard, Snippet, write


def read(path):
    text = path.read_text(encoding="ascii")  # nothing else is in it
    start = text.index("(") + 1
    inside = text[start : text.rindex(")")]
    return json.loads(inside if inside[0] == "{" else inside[inside.index(",") + 1 :])


def test_a_feature_takes_no_more_than_it_may(tmp_path):
    long = [Snippet(1.0, ["漢字" * 5] * 19, [0.123456] * 19, 3)] * 40
    write(
        tmp_path / "site", [FeatureCard(7, 0.1, 1.0, 0.5, groups=[("a", long), ("b", long[:3])])], title="x"
    )
    found = read(tmp_path / "site/data/features-00000.js")["7"]
    assert len(json.dumps(found, separators=(",", ":"))) <= LARGEST
    assert found["groups"][1][1] and found["groups"][0][1]


def test_markup_numbers_and_marks_are_data(tmp_path):
    nan = float("nan")
    word = "\u202e\udcff</script><script>x"
    card = FeatureCard(
        0, nan, 2.0, float("inf"), raises=[(word, 1.0)], groups=[("g", [Snippet(1.0, [word], [nan], 0)])]
    )
    index = write(tmp_path / "site", [card], title=word, facts=[(word, word)], notes=[word], command=word)
    found = read(tmp_path / "site/data/features-00000.js")["0"]
    assert found["density"] is None and found["mean"] is None and found["groups"][0][1][0]["a"] == [None]
    assert "\\u202e" in found["raises"][0][0] and "\\udcff" in found["raises"][0][0]
    for page in ("index.html", "feature.html"):
        text = (index.parent / page).read_text(encoding="utf-8")
        assert "<script>" not in text and "\u202e" not in text


def test_columns_that_were_not_measured_are_not_shown(tmp_path):
    write(
        tmp_path / "site",
        [FeatureCard(k, 0.1, 1.0, 0.5, effect=0.1 if k else None) for k in range(3)],
        title="x",
    )
    found = read(tmp_path / "site/data/index.js")
    assert list(found["columns"]) == ["density", "maximum", "effect"]
    assert found["rows"]["effect"] == [None, 0.1, 0.1]


def test_an_earlier_dashboard_is_replaced_and_others_are_left(tmp_path):
    site = tmp_path / "site"
    write(site, [FeatureCard(k, 0.1, 1.0, 0.5) for k in range(70)], title="x")
    assert len(list((site / "data").iterdir())) == 4
    write(site, [FeatureCard(1, 0.1, 1.0, 0.5)], title="x")
    assert sorted(p.name for p in (site / "data").iterdir()) == ["features-00000.js", "index.js"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \('thesis.tex'\)"):
        write(tmp_path / "other", [FeatureCard(1, 0.1, 1.0, 0.5)], title="x")
    with pytest.raises(InputError, match="cards: got none"):
        write(tmp_path / "none", [], title="x")
    with pytest.raises(InputError, match="feature 1 comes twice"):
        write(tmp_path / "twice", [FeatureCard(1, 0.1, 1.0, 0.5)] * 2, title="x")
