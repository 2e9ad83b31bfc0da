"""The verdict: what the sections' numbers say together, as plain sentences, worst first.

Nothing is measured here, and every sentence stands on a number of `report.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineament.audit.lenses.gaze import where
from lineament.audit.patch_exchange import Window
from lineament.audit.phrases import compact, percent, points, short, within
from lineament.report.page import Finding
from lineament.report.section import Section
from lineament.report.text import printable

_SETTLE = "Make sure that these are data like those it was trained on; if they are, train it longer or at a smaller rate (lineament train --sam seeks flatter places)."


def findings(sections: Sequence[Section]) -> list[Finding]:
    """The sentences of the verdict; what the network relies on comes first, then how it holds it."""
    told = {
        "gaze": _gaze,
        "accuracy": _accuracy,
        "collapse": _collapse,
        "spectrum": _spectrum,
        "landscape": _landscape,
        "parts": _parts,
        "tokens": _tokens,
        "components": _components,
    }
    by_name = {section.name: section for section in sections if section.status not in ("failed", "skipped")}
    found: list[Finding] = []
    for name, tell in told.items():
        if name in by_name:
            found += tell(by_name[name].numbers)
    order = ("warning", "note", "good")
    return sorted(found, key=lambda f: order.index(f.severity))


def _gaze(n: dict[str, Any]) -> list[Finding]:
    v = n["place"]
    w = v["window"]
    place = where(Window(w["top"], w["left"], w["height"], w["width"]), *n["size"])
    if v["decides"]:
        return [
            Finding(
                "warning",
                f"It relies on one small patch at {place}, {percent(v['area'], 0)} of the image: a shortcut, unless that is where the answer lies. Taking that patch alone from another image "
                f"turns {percent(v['followed'], 0)} of answers into the answer to that image; patches elsewhere turn {percent(v['others_followed'], 0)}. "
                f"Accuracy falls from {percent(v['accuracy'])} to {percent(v['swapped_accuracy'])}.",
                "gaze",
                advice="Look at that place in your images (the section shows some). If the answer does not lie there, cover or mix that patch across the classes of the training data, train again and audit again.",
            )
        ]
    lost = v["accuracy"] - v["swapped_accuracy"]
    if v["matters"]:
        return [
            Finding(
                "note",
                f"Where it looks matters most at {place}: taking that patch from another image costs {points(lost)} of accuracy. No single patch decides the answer.",
                "gaze",
                advice="See whether what you ask about always lies there; if not, vary its place in the training data.",
            )
        ]
    return [
        Finding(
            "good",
            f"It relies on no single fixed place of the image: of {v['windows']} patches tried, none decides the answer.",
            "gaze",
        )
    ]


def _accuracy(n: dict[str, Any]) -> list[Finding]:
    overall, groups = n["overall"], n["groups"]
    found = []
    if n["task"] == "regression":
        worst = max(groups, key=lambda g: g["mae"], default=None)
        best = min(groups, key=lambda g: g["mae"], default=None)
        if worst and best and worst["mae"] > 1.5 * best["mae"]:
            found.append(
                Finding(
                    "warning",
                    f"Its error rises from {compact(best['mae'])} in group {_quoted(best)} to {compact(worst['mae'])} in group {_quoted(worst)}.",
                    "accuracy",
                    advice="Look at what sets that group apart, and train on more samples of it; give the error by group wherever you give it.",
                )
            )
        useless = overall["r2"] < 0
        found.append(
            Finding(
                "warning" if useless else "good",
                f"It explains {percent(max(overall['r2'], 0))} of the targets' variance and is off by {compact(overall['mae'])} on average"
                + (", worse than always answering the mean." if useless else "."),
                "accuracy",
                advice="Make sure that inputs and targets are scaled as they were in training."
                if useless
                else "",
            )
        )
        return found
    if len(groups) > 1:
        best, worst = max(groups, key=lambda g: g["accuracy"]), min(groups, key=lambda g: g["accuracy"])
        if worst["high"] < best["low"]:
            found.append(
                Finding(
                    "warning" if best["accuracy"] - worst["accuracy"] > 0.1 else "note",
                    f"Accuracy falls from {percent(best['accuracy'])} in group {_quoted(best)} to {percent(worst['accuracy'])} in group {_quoted(worst)}.",
                    "accuracy",
                    advice="Look at what sets that group apart, and train on more samples of it or weigh them up; give the accuracy by group wherever you give it.",
                )
            )
        else:
            found.append(
                Finding(
                    "good",
                    f"Its {len(groups)} groups fare alike, as far as {overall['count']} samples can tell.",
                    "accuracy",
                )
            )
    classes = n["classes"]
    worst = min(classes, key=lambda c: c["accuracy"])
    if worst["high"] < overall["low"] and overall["accuracy"] - worst["accuracy"] > 0.1:
        found.append(
            Finding(
                "note",
                f"Class {_quoted(worst)} is right in {percent(worst['accuracy'])} only, against {percent(overall['accuracy'])} overall.",
                "accuracy",
                advice="See what it is taken for (the table of mistakes), check the labels of a few of these samples, and train on more of them.",
            )
        )
    known = n["calibration"]
    gap = known["confidence"] - known["accuracy"]
    if known["error"] > 0.05 and abs(gap) > 0.03:
        found.append(
            Finding(
                "warning" if gap > 0.15 else "note",
                f"It is {'over' if gap > 0 else 'under'}confident: {percent(known['confidence'])} sure on average, and right in {percent(known['accuracy'])}.",
                "accuracy",
                advice="Do not use its confidence as it is: divide the logits by one temperature that you fit on held-out data (the paper that the section names says how).",
            )
        )
    poor = overall["low"] <= n["majority"]
    told = (
        "which is no better than" if overall["accuracy"] <= n["majority"] else "which may be no better than"
    )
    found.append(
        Finding(
            "warning" if poor else "good" if overall["accuracy"] >= 0.8 else "note",
            f"It is right for {percent(overall['accuracy'])} of {overall['count']} samples"
            + (
                f", {told} always naming the most frequent class ({percent(n['majority'])})." if poor else "."
            ),
            "accuracy",
            advice="Make sure first that samples reach it as they did in training (--image-size, --normalize) and that class numbers mean the same to both; then train it longer or on more data."
            if poor
            else "",
        )
    )
    return found


def _collapse(n: dict[str, Any]) -> list[Finding]:
    if n["few"]:
        few = "There are too few samples of each class to tell how tightly it holds them."
        return [Finding("note", few, "collapse", "Audit more samples of each class.")]
    last = n["sites"][-1]
    value = last["nc1_tilde"]
    if value is None or not value < float("inf"):
        return [
            Finding(
                "warning",
                "At the last place its features are the same for every class.",
                "collapse",
                advice="Make sure that its inputs differ and are scaled as in training; a network that answers the same to all has to be trained anew.",
            )
        ]
    near = last["nearest_mean_accuracy"]
    right = "" if near is None else f"; the nearest class mean is right for {percent(near)}"
    if value < 0.1:
        text = f"It holds each class as nearly one point (variance within classes {compact(value)} of that between){right}."
    elif value < 0.7:
        text = f"It holds each class as a cluster of its own (variance within classes {compact(value)} of that between){right}."
    else:
        text = f"Its classes overlap at the last place (variance within classes {compact(value)} times that between){right}."
    advice = (
        ""
        if value < 0.7
        else "Nothing, if it is right often enough; otherwise train it longer, or a larger one."
    )
    return [Finding("good" if value < 0.7 else "note", text, "collapse", advice)]


def _spectrum(n: dict[str, Any]) -> list[Finding]:
    last = n["sites"][-1]
    idle = sum(s["silent"] + s["doubled"] for s in n["sites"])
    total = sum(s["units"] for s in n["sites"])
    text = f"It holds what it knows in {compact(last['effective_rank'])} effective directions of {last['units']} units at {short(last['site'], 40)}"
    if idle > 0.25 * total:
        return [
            Finding(
                "note",
                f"{text}; {percent(idle / total, 0)} of all units never vary or copy another.",
                "spectrum",
                advice="Nothing, if it is right often enough: a network with fewer channels may do as well.",
            )
        ]
    return [Finding("good", f"{text}.", "spectrum")]


def _landscape(n: dict[str, Any]) -> list[Finding]:
    if n["settled"] is None:
        return [
            Finding(
                "note",
                f"Its loss on these samples is zero within rounding ({compact(n['loss'])}), so that how settled it is cannot be told from them.",
                "landscape",
                advice="Audit samples that it was not trained on.",
            )
        ]
    if n["bottom"] < -0.1 * max(n["top"], 0):
        return [
            Finding(
                "note",
                f"It does not sit in a minimum: the loss curves downwards (least eigenvalue {compact(n['bottom'])}, greatest {compact(n['top'])}).",
                "landscape",
                advice=_SETTLE,
            )
        ]
    if n["criteria"]["verdict"] == "flat":
        return [
            Finding(
                "note",
                "Its loss on these samples has no curvature at all: small changes of the weights do not matter to it, or only in a straight line.",
                "landscape",
            )
        ]
    if n["criteria"]["verdict"] != "settled":
        k = [v for v in n["criteria"]["k"] if v is not None]
        share = f" (K_H0.5 = {compact(sum(k) / len(k))})" if k else ""
        return [
            Finding(
                "note",
                f"Nothing curves steeply downwards where it is (least eigenvalue {compact(n['bottom'])}, greatest {compact(n['top'])}), but many directions do gently{share}: not quite a minimum.",
                "landscape",
                advice=_SETTLE,
            )
        ]
    if not n["settled"]:
        return [
            Finding(
                "note",
                f"Nothing was found that curves steeply downwards where it is, but the search for the spectrum's ends ({compact(n['bottom'])} and {compact(n['top'])}) had not settled.",
                "landscape",
                advice="Audit with another --seed or more --samples, and compare.",
            )
        ]
    return [
        Finding(
            "good",
            f"It sits in a minimum of greatest curvature {compact(n['top'])}; {percent(n['flat_share'], 0)} of weight directions are nearly flat.",
            "landscape",
        )
    ]


def _parts(n: dict[str, Any]) -> list[Finding]:
    groups = n["groups"]
    share = n["free"] / len(groups)
    top = max(groups, key=lambda g: g["mean_changed"])
    if share > 0.5:
        return [
            Finding(
                "note",
                f"{percent(share, 0)} of its channel groups can each be silenced with hardly an answer changing: it has room to spare.",
                "parts",
                advice="Nothing, if its size is no burden; otherwise train one with fewer channels, or take groups away one after the other and measure again.",
            )
        ]
    effect = (
        f"changes {percent(top['mean_changed'], 0)} of answers"
        if n["task"] == "classification"
        else f"moves the answers by {percent(top['mean_changed'], 0)} of their spread"
    )
    return [
        Finding(
            "good",
            f"It uses {'all' if not n['free'] else 'most'} of its parts: {percent(share, 0) if n['free'] else 'none'} of its channel groups can be silenced unnoticed; silencing the weightiest, at {short(top['site'], 40)}, {effect}.",
            "parts",
        )
    ]


def _tokens(n: dict[str, Any]) -> list[Finding]:
    reach = sorted(n["reach"])[len(n["reach"]) // 2]
    text = f"Half of what decides its next token lies {within(reach)} (median of {len(n['reach'])} prompts)"
    if n["contradicted"]:
        return [
            Finding(
                "warning",
                f"{text}, but the attribution fails its own test: other tokens decide more.",
                "tokens",
                advice="Do not rely on the tokens named here: try more prompts, or another method (lineament explain --method integrated_gradients).",
            )
        ]
    proof = "" if n["true"] else "; whether the tokens named are the right ones cannot be told from these"
    return [Finding("good" if n["true"] else "note", f"{text}{proof}.", "tokens")]


def _components(n: dict[str, Any]) -> list[Finding]:
    if n["right"] < 0.6:
        return [
            Finding(
                "warning",
                f"It prefers the right answer in {percent(n['right'], 0)} of the prompt pairs only: it hardly has the behaviour that they ask for.",
                "components",
                advice="Choose pairs that it answers rightly; what carries a behaviour can only be found where there is one.",
            )
        ]
    if not n["hangs_on_what_differs"]:
        return [
            Finding(
                "warning",
                f"What the prompt pairs change hardly matters to it: it prefers the right answer in {percent(n['right'], 0)} of clean prompts, and the same answer in "
                f"{percent(n['right_when_corrupt'], 0)} of corrupt ones.",
                "components",
                advice="Choose pairs whose corrupt prompt asks for the wrong answer.",
            )
        ]
    top = n["top_head"]
    return [
        Finding(
            "good",
            f"It prefers the right answer in {percent(n['right'], 0)} of the prompt pairs; head {top['head']} of layer {top['layer']} alone brings back {percent(top['score'], 0)} of "
            f"the difference, and five heads hold {percent(n['five_heads'], 0)} of what all heads bring back.",
            "components",
        )
    ]


def _quoted(entry: dict[str, Any]) -> str:
    return f"“{printable(entry['name'], limit=60)}”"
