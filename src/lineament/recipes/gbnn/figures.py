"""Figures of the gbnn recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineament.recipes.gbnn.study import Cut
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(cuts: Mapping[int, Cut], out: Path) -> list[Figure]:
    """Accuracy against the units that are kept."""
    first = next(iter(cuts.values()))
    mean = lambda name, i: sum(c.kept[name][i] for c in cuts.values()) / len(cuts)  # noqa: E731

    def draw(ax: Any) -> None:
        for k, name in enumerate(first.kept):
            ax.plot(
                first.units, [mean(name, i) for i in range(len(first.units))], "o-", color=f"C{k}", label=name
            )
        anew = {int(w): sum(c.trained_anew[w] for c in cuts.values()) / len(cuts) for w in first.trained_anew}
        ax.plot(list(anew), list(anew.values()), "s--", color="C7", label="MLP adam, trained anew")
        ax.set(xlabel="units kept", ylabel="accuracy on digits")
        ax.legend()

    told = ", ".join(f"{mean('boosted', i):.3f} with {m}" for i, m in enumerate(first.units))
    shown = picture(
        draw, size=(5.6, 3.4), caption="A boosted network's units come in order of importance; an MLP's are sorted by the norm of their output weights.",
        alt=f"Accuracy against units kept: boosted {told}.",
    )  # fmt: skip
    return [save(shown, out, "units")]
