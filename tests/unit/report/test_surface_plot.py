"""Pictures to be turned: the numbers are the plane's, what comes from files is only numbers and words, and nothing ends its script."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lineament.core.checks import InputError
from lineament.measure.landscape.results import Line, Plane
from lineament.report.figures import picture
from lineament.report.interactive import drawings, kinds
from lineament.report.outcome import Figure, Outcome
from lineament.report.page import render
from lineament.report.section import Section
from lineament.report.surface_plot import SurfacePlot


def bowl() -> Plane:
    a, b = torch.linspace(-1, 1, 5), torch.linspace(-2, 2, 3)
    loss = (a[:, None] ** 2 + b[None, :]).double()
    loss[0, 0], loss[4, 2] = torch.nan, torch.inf
    return Plane(a, b, loss, {"accuracy": loss * 0}, ("first", "second"))


def test_the_drawing_holds_the_planes_values_where_they_were_measured():
    found = bowl()
    for kind in ("contour", "surface"):
        trace = SurfacePlot.of(found).drawings()[kind]["data"][0]
        assert trace["x"] == found.a.tolist() and trace["y"] == found.b.tolist()
        # Plotly's rows go along y.
        assert len(trace["z"]) == 3 and len(trace["z"][0]) == 5
        assert trace["text"][2][1] == f"{float(found.loss[1, 2]):.4g}"
        assert trace["text"][0][0] == trace["text"][2][4] == "not finite"
    surface = SurfacePlot.of(found).drawings()["surface"]["data"][0]
    assert surface["z"][2][1] == float(found.loss[1, 2])
    assert surface["z"][0][0] is None and surface["z"][2][4] is None


def test_shades_rise_with_the_loss_and_their_scale_says_the_loss():
    found = SurfacePlot.of(bowl()).drawings()["contour"]["data"][0]
    finite = [(v, float(t)) for row, texts in zip(found["z"], found["text"]) for v, t in zip(row, texts) if v is not None]  # fmt: skip
    assert [v for v, _ in sorted(finite, key=lambda p: p[1])] == sorted(v for v, _ in finite)
    low, high = min(t for _, t in finite), max(t for _, t in finite)
    ticks = dict(zip(found["colorbar"]["tickvals"], map(float, found["colorbar"]["ticktext"])))
    assert ticks[0.0] == low and ticks[1.0] == pytest.approx(high, rel=1e-2)
    assert ticks[0.5] == pytest.approx(low + (high - low) / 8, rel=1e-2)


def test_figures_of_ones_own():
    assert [t.type for t in SurfacePlot.of(bowl()).figure().data] == [
        "contour",
        "scatter",
        "surface",
        "scatter3d",
    ]
    assert SurfacePlot.of(bowl(), "accuracy").figure().layout.scene.zaxis.title.text == "accuracy"
    line = Line(torch.tensor([0.0, 1.0]), torch.tensor([2.0, torch.inf]))
    drawn = SurfacePlot.of(line).figure().data
    assert [t.type for t in drawn] == ["scatter"] and list(drawn[0].y) == [2.0, None]


def test_a_flat_plane_is_drawn():
    flat = SurfacePlot.from_values(
        {"x": [0, 1], "y": [0, 1], "z": [[3.0, 3.0], [3.0, 3.0]]}, ("a", "b", "loss")
    )
    assert flat.drawings()["contour"]["data"][0]["z"] == [[0.0, 0.0], [0.0, 0.0]]
    nothing = SurfacePlot.from_values(
        {"x": [0, 1], "y": [0, 1], "z": [[torch.nan] * 2] * 2}, ("a", "b", "loss"), origin="here"
    )
    assert len(nothing.drawings()["surface"]["data"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"x": [0.0]},
        {"x": [0.0, float("nan")]},
        {"x": [0.0, "1"]},
        {"x": [0.0, True]},
        {"z": [[1.0, 2.0]]},
        {"z": [[1.0], [2.0]]},
        {"z": 3},
        {"y": [0.0]},
        {"labels": ["a", "b"]},
        {"labels": None},
    ],
)
def test_what_is_no_surface_is_refused(change):
    good = {"x": [0.0, 1.0], "y": [0.0, 1.0], "z": [[1.0, 2.0], [3.0, None]], "labels": ["a", "b", "loss"]}
    assert SurfacePlot.from_dict(good).to_dict()["z"] == good["z"]
    with pytest.raises(InputError):
        SurfacePlot.from_dict({**good, **change})
    for other in (None, [], "x", 3):
        with pytest.raises(InputError):
            SurfacePlot.from_dict(other)


def test_more_values_than_a_browser_draws_are_refused():
    side = [float(k) for k in range(1001)]
    with pytest.raises(InputError, match="at most"):
        SurfacePlot(side, side, [side] * 1001, ("a", "b", "loss"))


def test_a_file_cannot_bring_its_own_drawing():
    raw = {
        **SurfacePlot.of(bowl()).to_dict(),
        "data": [{"type": "image"}],
        "layout": {"images": ["http://x"]},
    }
    assert SurfacePlot.from_dict(raw).drawings() == SurfacePlot.of(bowl()).drawings()


def test_words_end_neither_the_script_nor_the_label():
    words = "</script><!--<script>alert(1)</script> %{x} <b>&amp;\u2028\u202e\ud800"
    shown = SurfacePlot.from_values(
        {"x": [0, 1], "y": [0, 1], "z": [[1, 2], [3, 4]]}, (words, words, words), title=words
    )
    text = drawings([shown])
    assert "<" not in text and ">" not in text and "&" not in text and text.isascii()
    read = json.loads(text)[0]
    label = read["contour"]["layout"]["xaxis"]["title"]["text"]
    assert "<" not in label and "%{" not in label and "\u202e" not in label
    assert "\u202e" not in read["height"]
    assert "%{text}" in read["contour"]["data"][0]["hovertemplate"]
    assert read["contour"]["data"][0]["hovertemplate"].count("%{") == 3
    assert [kind for kind, _ in kinds([shown])] == ["contour", "surface"]


def test_a_page_has_scripts_only_for_what_turns_and_they_are_named_by_hash():
    still = picture(lambda ax: ax.plot([0, 1]), alt="a line", caption="")
    turning = picture(lambda ax: ax.plot([0, 1]), alt="a line", caption="", surfaces=[SurfacePlot.of(bowl())])

    def page(*pictures):
        return render("t", "", [], [], [Section("s", "t", "note", "", "", "", list(pictures))], command="c")

    assert "<script" not in page(still) and "script-src" not in page(still)
    text = page(still, turning, turning)
    assert text.count('id="plotly"') == 1 and text.count("[data-surface-plot]") == 1
    policy = text.split("script-src ")[1].split(";")[0]
    assert policy.count("sha256-") == 2 and "unsafe" not in policy
    assert "http" not in text.split("<body>")[1].split('id="plotly"')[0]


def test_pictures_and_figures_keep_them(tmp_path):
    shown = picture(lambda ax: ax.plot([0, 1]), alt="a", caption="", surfaces=[SurfacePlot.of(bowl())])
    assert shown.to_dict()["surfaces"] == [SurfacePlot.of(bowl()).to_dict()]
    assert "surfaces" not in picture(lambda ax: ax.plot([0, 1]), alt="a", caption="").to_dict()
    outcome = Outcome("s", "t", "quick", {}, [], [], [Figure("a.svg", "", "", shown.surfaces)])
    read = Outcome.read(outcome.write(tmp_path))
    assert read.figures[0].surfaces[0].to_dict() == shown.surfaces[0].to_dict()


def test_plotly_is_imported_only_where_something_is_drawn():
    code = "import sys, lineament.cli, lineament.report.page, lineament.measure.landscape.grids; print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
