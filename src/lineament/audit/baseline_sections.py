"""The page of a baseline: the table of all pairs, where the best of them errs, and whether more data would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lineament.audit.baseline_pairs import Pair, mean_accuracy
from lineament.audit.phrases import percent
from lineament.core.statistics.shares import wilson
from lineament.data.samples import Samples
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Section
from lineament.report.text import plain

SLUG = "bangla-digits"


def to_beat(best: tuple[str, str], accuracy: float, first: float, test: int, train: int, splits: int) -> str:
    """What a network must beat, or that these samples cannot tell a better one; ``first``: the accuracy on the split of the interval."""
    low, high = wilson(round(first * test), test)
    if accuracy >= 1:
        on = (
            f"these {test:,} test samples"
            if splits == 1
            else f"the {test:,} test samples of any of {splits} splits"
        )
        return (
            f"No network can be seen to beat this here: {best[0]} read by {best[1]} was never wrong on {on} after {train:,} training samples "
            f"(95 % interval {percent(low)} to {percent(high)})."
        )
    if splits > 1:
        return (
            f"A network must beat {percent(accuracy)}: {best[0]} read by {best[1]} is right for so many of {test:,} test samples on average over {splits} splits, "
            f"after {train:,} training samples each (on the first {percent(first)}, 95 % interval {percent(low)} to {percent(high)})."
        )
    return (
        f"A network must beat {percent(accuracy)}: {best[0]} read by {best[1]} is right for so many of {test:,} test samples after {train:,} training samples "
        f"(95 % interval {percent(low)} to {percent(high)})."
    )


def table_section(
    pairs: Sequence[Pair], names: Sequence[str], kinds: Sequence[str], train: int, test: int, splits: int
) -> Section:
    accuracy = np.array([[mean_accuracy(pairs, n, c) for c in kinds] for n in names])
    row, column = divmod(int(accuracy.argmax()), len(kinds))
    rows = []
    for n in names:
        for c in kinds:
            mine = [p for p in pairs if (p.descriptor, p.classifier) == (n, c)]
            values = [p.accuracy for p in mine]
            low, high = wilson(round(mine[0].accuracy * test), test)
            spread = (
                percent(float(np.std(values, ddof=1))) if splits > 1 else f"{percent(low)} to {percent(high)}"
            )
            rows.append(
                (
                    n, c, mine[0].features, percent(float(np.mean(values))), spread, float(np.mean([p.macro_f1 for p in mine])),
                    ", ".join(f"{key} = {value}" for key, value in mine[0].settings.items()) or "usual ones", float(np.mean([p.seconds for p in mine])),
                )
            )  # fmt: skip

    def draw(ax: Any) -> None:
        shown = ax.imshow(accuracy, cmap="viridis", vmin=max(0.0, accuracy.min() - 0.05), vmax=1)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_yticks(range(len(names)), [n[-24:] for n in names])
        middle = (shown.norm.vmin + 1) / 2
        for i, j in np.ndindex(*accuracy.shape):
            ax.text(
                j,
                i,
                f"{100 * accuracy[i, j]:.1f}",
                ha="center",
                va="center",
                color="black" if accuracy[i, j] > middle else "white",
            )

    spread_title = "deviation over splits" if splits > 1 else "95 % interval"
    return Section(
        "table", "What does each descriptor reach with each classifier?", "note", percent(float(accuracy.max())),
        f"of test samples right: {names[row]} with {kinds[column]}",
        f"Each classifier was {'tuned on' if any(p.settings for p in pairs) else 'fitted, with usual settings, to'} {train:,} training samples only and looked at {test:,} test samples once{f', on {splits} splits' if splits > 1 else ''}; the best, {names[row]} with {kinds[column]}, "
        f"is right for {percent(float(accuracy.max()))}. It was picked as the best of {accuracy.size} on these test samples, so it is a little flattered.",
        [
            picture(
                draw, size=(2.2 + 0.9 * len(kinds), 1.4 + 0.5 * len(names)), caption="Accuracy on the test part in %, descriptors down, classifiers across.",
                alt=f"Accuracy by descriptor and classifier, from {percent(float(accuracy.min()))} to {percent(float(accuracy.max()))}.",
            )
        ],
        [Table("Every pair", ("descriptor", "classifier", "features", "accuracy", spread_title, "macro F1", "settings", "seconds to tune and fit"), rows)],
        SLUG,
        {"pairs": [{k: v for k, v in plain(p).items() if k not in ("predicted", "margin")} for p in map(_lists, pairs)], "training": train, "test": test},
    )  # fmt: skip


def _lists(pair: Pair) -> dict[str, Any]:
    return {k: (v.tolist() if isinstance(v, np.ndarray) else v) for k, v in pair.__dict__.items()}


def mistakes_section(
    top: Pair, truth: np.ndarray, test: np.ndarray, held: Samples, images: bool, splits: int
) -> Section:
    classes = np.unique(held.targets.numpy())
    names = [held.classes[c] if c < len(held.classes) else str(c) for c in classes.tolist()]
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (np.searchsorted(classes, truth), np.searchsorted(classes, top.predicted)), 1)
    wrong = np.flatnonzero(top.predicted != truth)
    order = wrong if top.margin is None else wrong[np.argsort(-top.margin[wrong])]

    def draw(ax: Any) -> None:
        ax.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(names)), [n[:12] for n in names], rotation=90)
        ax.set_yticks(range(len(names)), [n[:12] for n in names])
        ax.set(xlabel="predicted", ylabel="true")

    pictures = [
        picture(
            draw, size=(4.6, 4.2), caption="Confusion of the best pair: shares of each true class.",
            alt=f"Confusion matrix of {len(names)} classes; {int(np.trace(counts))} of {int(counts.sum())} on its diagonal.",
        )
    ]  # fmt: skip
    shown = order[:8]
    if images and len(shown):
        x = held.inputs[torch.from_numpy(test[shown])].double()

        def mistakes(axes: Any) -> None:
            for place, ax in enumerate(np.asarray(axes).ravel()):
                ax.set_axis_off()
                if place < len(shown):
                    one = _shown(x[place])
                    one = (one - one.min()) / max(float(one.max() - one.min()), 1e-12)
                    ax.imshow(one, cmap="gray")
                    said = names[int(np.searchsorted(classes, top.predicted[shown[place]]))]
                    ax.set_title(
                        f"{names[int(np.searchsorted(classes, truth[shown[place]]))][:9]}, said {said[:9]}",
                        fontsize=7,
                    )

        pictures.append(
            picture(
                mistakes, size=(6.4, 3.4), panels=(2, 4), kind="png", caption="Its surest mistakes first: the true class, and what it said.",
                alt=f"{len(shown)} samples that the best pair calls by a wrong class.",
            )
        )  # fmt: skip
    worst = counts - np.diag(np.diag(counts))
    i, j = divmod(int(worst.argmax()), len(names))
    told = (
        f"most often {names[i]} is called {names[j]} ({int(worst[i, j])} of {int(counts[i].sum())})"
        if worst.any()
        else "it makes no mistake"
    )
    return Section(
        "mistakes", "Where does the best of them err?", "note", f"{len(wrong):,}", f"of {len(truth):,} test samples wrong",
        f"With {top.descriptor} and {top.classifier}{_on_first(splits)}, {told}.", pictures, [], SLUG,
        {"confusion": counts.astype(int).tolist(), "classes": names, "surest_mistakes": [int(held.index[test[w]]) for w in order[:50]]},
    )  # fmt: skip


def _shown(image: torch.Tensor) -> torch.Tensor:
    """[height, width] or [height, width, 3 or 4]: what can be drawn of one stored image."""
    if image.ndim == 2:
        return image
    return image.movedim(0, -1) if len(image) in (3, 4) else image.mean(0)


def _on_first(splits: int) -> str:
    return f" on the first of {splits} splits" if splits > 1 else ""


def size_section(top: Pair, sizes: Sequence[tuple[int, float]], splits: int) -> Section:
    from matplotlib.ticker import PercentFormatter

    def draw(ax: Any) -> None:
        ax.plot([n for n, _ in sizes], [a for _, a in sizes], "o-", color="C0")
        ax.set_xscale("log")
        ax.set_xticks([n for n, _ in sizes], [f"{n:,}" for n, _ in sizes])
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.set(xlabel="training samples", ylabel="accuracy on the test part")
        ax.grid(True)

    gain = sizes[-1][1] - sizes[-2][1] if len(sizes) > 1 else 0.0
    return Section(
        "size", "Would more data help?", "note", percent(sizes[-1][1]), f"after {sizes[-1][0]:,} training samples",
        f"With the settings chosen for all of them, {top.descriptor} and {top.classifier} reach{_on_first(splits)} "
        + ", ".join(f"{percent(a)} after {n:,}" for n, a in sizes)
        + (f"; going from {sizes[-2][0]:,} to {sizes[-1][0]:,} samples changed it by {100 * gain:+.1f} points." if len(sizes) > 1 else "."),
        [picture(draw, size=(5.2, 3.0), caption="Accuracy against training size.", alt="Accuracy against training size: " + ", ".join(f"{percent(a)} at {n}" for n, a in sizes) + ".")],
        [], SLUG, {"sizes": [list(pair) for pair in sizes]},
    )  # fmt: skip
