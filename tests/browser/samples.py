"""Synthetic report and runs for the browser tests: every status, every kind of picture, hostile words everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lineament.report.figures import picture, save
from lineament.report.outcome import Claim, Figure, Outcome, Table
from lineament.report.page import write
from lineament.report.section import Finding, Section
from lineament.report.surface_plot import SurfacePlot
from lineament.report.text import printable
from tests.browser.chrome import HOSTILE


def bars(names: list[str], values: list[float], xlabel: str):
    """A horizontal bar chart as a drawing function."""

    def draw(ax):
        ax.barh(range(len(names)), values, color=["C0"] * (len(names) - 1) + ["C1"])
        ax.set_yticks(range(len(names)), [printable(name, limit=24) for name in names])
        ax.invert_yaxis()
        ax.set_xlabel(xlabel)

    return draw


def bowls():
    """Two bowls and a curve, one with a hole, named as users name things."""
    a, b = np.linspace(-1, 1, 9), np.linspace(-2, 2, 11)
    z = a[:, None] ** 2 + 0.5 * b[None, :] ** 2
    holed = np.where(z > 2.5, np.nan, z)
    return [
        SurfacePlot.from_values({"x": a, "y": b, "z": z}, ("first way", "second way", "loss"), title="a bowl", origin="these weights"),
        SurfacePlot.from_values({"x": a, "y": b, "z": holed}, (HOSTILE[1], HOSTILE[6], HOSTILE[0]), title=HOSTILE[0], origin=HOSTILE[1]),
        SurfacePlot.from_values({"x": a, "z": a**2}, (HOSTILE[7], "", "%{z} <b>loss</b>"), title=HOSTILE[2]),
    ]  # fmt: skip


def report(folder: Path) -> Path:
    """A report with all five statuses; returns the page."""
    rng = np.random.default_rng(0)
    names = [str(digit) for digit in range(10)]
    accuracy = Section(
        "accuracy",
        "Accuracy by class and group",
        "warning",
        "31.4 %",
        "accuracy in the worst group",
        "The network is right on 97.2 % of the samples, but on only 31.4 % of those whose mark disagrees with their class.",
        pictures=[
            picture(
                bars(names, [*(0.9 + 0.1 * rng.random(9)), 0.61], "accuracy"),
                alt="Bars of accuracy for ten classes; class 9 is lowest at 0.61, the others lie above 0.9.",
                caption="Accuracy of each class on the test samples. The least accurate class is drawn in orange.",
            )
        ],
        tables=[
            Table(
                "Accuracy by group",
                ["group", "samples", "accuracy", "calibration error"],
                [
                    ["mark agrees", 1437, 0.991, 0.012],
                    ["mark disagrees", 360, 0.314, 0.41],
                    ["all", 1797, 0.972, 0.02],
                ],
            )
        ],
        method="normgrad",
        numbers={"accuracy": 0.972},
        seconds=0.8,
    )

    def grid(axes):
        for ax in axes.flat:
            ax.imshow(rng.random((8, 8)))
            ax.set_axis_off()

    gaze = Section(
        "gaze",
        "Where it looks",
        "note",
        "0.62",
        "share of the saliency on the mark",
        "On most samples the network looks at the corner with the mark rather than at the digit.",
        pictures=[
            picture(
                grid,
                alt="Eight small saliency maps in two rows; the brightest spot of each lies in the upper left corner.",
                caption="Saliency on four hits (above) and four misses (below).",
                kind="png",
                panels=(2, 4),
                size=(6.4, 3.2),
            )
        ],
        seconds=3.1,
    )
    curve = picture(
        lambda ax: (
            [
                ax.loglog(range(1, 65), np.arange(1, 65.0) ** -p, label=f"layer {i}")
                for i, p in enumerate((1, 2, 3))
            ]
            and ax.legend()
        ),
        alt="Three spectra that fall as power laws, the last layer fastest.",
        caption="Eigenvalues of the feature covariance of each layer, largest first.",
    )
    spectrum = Section(
        "spectrum", "Spectrum of the features", "good", "11.2", "effective dimensions of 64 in the last layer",
        "Each layer uses fewer directions than the one before it.", pictures=[curve], seconds=1.2,
    )  # fmt: skip
    hostile = Section(
        "hostile",
        "Names such as " + HOSTILE[0],
        "note",
        HOSTILE[8],
        HOSTILE[1],
        "These names come from users: " + " — ".join(HOSTILE),
        pictures=[
            picture(
                bars(list(HOSTILE), list(range(len(HOSTILE))), HOSTILE[3]),
                alt=HOSTILE[1],
                caption=HOSTILE[0],
                size=(6.4, 4),
            )
        ],
        tables=[Table(HOSTILE[4], [*HOSTILE], [[*HOSTILE], [*range(len(HOSTILE))]])],
        method=HOSTILE[9],
    )
    plane = Section(
        "plane", "How the loss looks", "note", "2", "curvature", "It is a bowl.",
        pictures=[
            picture(
                lambda ax: ax.contour(np.random.default_rng(0).random((4, 4))),
                alt="Contours of a bowl.",
                caption="The loss around the weights.",
                surfaces=bowls(),
            )
        ],
    )  # fmt: skip
    failed = Section(
        "landscape", "How flat the loss is", "failed", "", "", "The lens failed: the loss is not finite."
    )
    skipped = Section(
        "parts", "Which parts matter", "skipped", "", "", "Does not apply: the network has no channels."
    )
    page, _ = write(
        folder,
        "What a small network relies on",
        "A convolutional network trained on digits with a planted mark, audited on 1,797 samples by six lenses.",
        [("Network", "digits.SmallNet"), ("Parameters", 9834), ("Data", "digits"), ("Samples", 1797), ("Device", "cpu"), (HOSTILE[1], HOSTILE[0])],
        [
            Finding("good", "Its features use fewer directions layer by layer.", "spectrum"),
            Finding("warning", "It relies on the mark: without it, accuracy falls from 97.2 % to 31.4 %.", "accuracy"),
            Finding("note", "62 % of the saliency lies on the mark, which covers 6 % of the picture.", "gaze"),
            Finding("note", HOSTILE[0] + HOSTILE[4] + HOSTILE[8], "no such section"),
        ],
        [accuracy, gaze, spectrum, plane, hostile, failed, skipped],
        command="lineament audit digits.py:net digits --out report --groups mark " + HOSTILE[0],
        methods={"normgrad": {"title": "There and Back Again", "year": 2020, "url": "https://arxiv.org/abs/2004.02866"}},
        versions={"lineament": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    return page


def runs(folder: Path) -> Path:
    """A folder of runs: two good ones, a hostile one, an unreadable one; returns the folder."""
    good = folder / "neural-collapse-quick"
    good.mkdir(parents=True)
    line = picture(
        lambda ax: ax.semilogy(range(50), np.exp(-np.arange(50) / 8), label="NC1") and ax.legend(),
        alt="NC1 falls exponentially over fifty steps.",
        caption="Within-class variability along the central path.",
        surfaces=bowls()[:2],
    )
    claims = [
        Claim("Within-class variability decreases along the flow", "strictly decreasing", "decreases in 50 of 50 steps", True),
        Claim("Feature regularisation matters more", "> 1", "0.93", False, "At this size the ratio is within its error."),
    ]  # fmt: skip
    table = Table("NC1 by layer", ["layer", "NC1", "NC2"], [["conv1", 12.5, 0.91], ["fc", 0.031, 0.08]])
    config = {"preset": "quick", "seed": 3, "widths": [8, 16]}
    Outcome(
        "neural-collapse", "Perturbation Analysis of Neural Collapse", "quick", config, claims, [table],
        [save(line, good, "path")], 12.5, {"lineament": "0.1.0"},
    ).write(good)  # fmt: skip
    bad = folder / "<b>bad & 'evil'"
    bad.mkdir()
    (folder / "secret.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (bad / "inside.svg").symlink_to(folder / "secret.svg")
    (bad / "notes.svg").write_text("no picture")
    words = [word.replace("\udcff", "?") for word in HOSTILE]
    figures = [
        *(Figure("../secret.svg", "up", "up"), Figure("inside.svg", "linked", "linked"), Figure("notes.svg", "text", "text")),
        *(Figure(word, word, word) for word in words),
    ]  # fmt: skip
    Outcome(
        "../../" + words[0], words[0], words[1], {words[2]: words[3]},
        [Claim(word, word, word, False, word) for word in words], [Table(words[0], words, [words])],
        figures, 1.0, {words[0]: words[1]},
    ).write(bad)  # fmt: skip
    broken = folder / "broken"
    broken.mkdir()
    (broken / "outcome.json").write_text('{"slug": "normgrad"')
    return folder
