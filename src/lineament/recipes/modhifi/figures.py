"""Figures of the modhifi recipe."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lineament.recipes.modhifi.claims import arm
from lineament.recipes.modhifi.unlearning import mean
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure

_LINES = (("saliency", "both"), ("magnitude", "both"), ("random", "both"), ("saliency", "norms"), ("magnitude", "alone"))  # fmt: skip


def draw_all(
    found: dict[str, list[Any]], gone: dict[str, list[Any]], texts: list[Any], config: Any, out: Path
) -> list[Figure]:
    """Write the recipe's figures into ``out``."""
    return [_pruning(found, config, out), _forgetting(gone, config, out), _texts(texts, out)]


def _pruning(found: dict[str, list[Any]], config: Any, out: Path) -> Figure:
    shares = sorted(config.shares)

    def draw(axes: Any) -> None:
        panels = axes[0] if len(found) > 1 else [axes]
        for ax, (name, each) in zip(panels, found.items()):
            for criterion, repair in _LINES:
                style = "o-" if repair == "both" else "s--"
                ax.plot(
                    [statistics.mean(t.parameters[f"{s:g}"] for t in each) for s in shares],
                    [arm(each, s, criterion, repair) for s in shares],
                    style,
                    label=f"{criterion}, {'both repairs' if repair == 'both' else repair}",
                )
            ax.axhline(statistics.mean(t.accuracy for t in each), color="C7", linewidth=0.8)
            ax.set(title=name, xlabel="parameters left", ylim=(0, 1.02))
        panels[0].set_ylabel("test accuracy")
        panels[-1].legend(fontsize=7, loc="lower right")

    told = "; ".join(
        f"{name}, {c} {r}: " + ", ".join(f"{arm(each, s, c, r):.2f}" for s in shares)
        for name, each in found.items()
        for c, r in _LINES
    )
    shown = picture(
        draw, panels=(1, len(found)), size=(3.6 * len(found), 3.2), alt=f"Test accuracy against the share of parameters that is left. {told}.",
        caption="Accuracy after pruning, without training: the repairs lift every criterion (the thin line is the whole network).",
    )  # fmt: skip
    return save(shown, out, "pruning")


def _forgetting(gone: dict[str, list[Any]], config: Any, out: Path) -> Figure:
    shares = sorted(config.forget_shares)
    curves = {
        name: [mean([u.before for u in each]), *(mean([u.shares[f"{s:g}"] for u in each]) for s in shares)]
        for name, each in gone.items()
    }

    def draw(ax: Any) -> None:
        for k, (name, rows) in enumerate(curves.items()):
            ax.plot([0, *shares], [r[0] for r in rows], "o--", color=f"C{k}", label=f"{name}, the class")
            ax.plot([0, *shares], [r[1] for r in rows], "o-", color=f"C{k}", label=f"{name}, the others")
        ax.set(xlabel="share of the pairs set to zero", ylabel="test accuracy", ylim=(-0.02, 1.02))
        ax.legend(fontsize=8)

    told = "; ".join(
        f"{name}: " + ", ".join(f"{a:.2f} and {b:.2f}" for a, b in rows) for name, rows in curves.items()
    )
    shown = picture(
        draw, alt=f"Accuracy on the class and on the others as more pairs are set to zero. {told}.",
        caption="Taking a class out: accuracy on it and on the others, by the share of pairs that is changed.",
    )  # fmt: skip
    return save(shown, out, "forgetting")


def _texts(texts: list[Any], out: Path) -> Figure:
    curves: dict[str, dict[float, float]] = {}
    for key in texts[0].pruned:
        removed, criterion, repair = key.split(" | ")
        name = criterion if repair == "alone" else f"{criterion}, compensated"
        curves.setdefault(name, {})[float(removed)] = statistics.mean(t.pruned[key] for t in texts)

    def draw(ax: Any) -> None:
        for k, (name, curve) in enumerate(curves.items()):
            style = "o-" if name.endswith("compensated") else "s--"
            ax.plot(list(curve), list(curve.values()), style, color=f"C{k // 2}", label=name)
        ax.axhline(statistics.mean(t.whole for t in texts), color="C7", linewidth=0.8)
        ax.set(xlabel="width removed", ylabel="perplexity of a byte")
        ax.legend(fontsize=7)

    told = "; ".join(f"{n}: " + ", ".join(f"{v:.2f}" for v in c.values()) for n, c in curves.items())
    shown = picture(
        draw, alt=f"Perplexity against the share of the perceptrons' width that was removed. {told}.",
        caption="The language model without a part of its perceptrons (the thin line is the whole model).",
    )  # fmt: skip
    return save(shown, out, "text")
