"""Figures of the neural-collapse recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineament.recipes.neural_collapse.claims import LOSSES, Collapsed, Depth, Theory
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure


def draw_all(
    depth: list[Depth], ends: dict[str, dict[str, Collapsed]], theory: Theory, config: Any, out: Path
) -> list[Figure]:
    """Write the recipe's five figures into ``out``."""
    return [
        _depth(depth, config, out),
        _decay(ends, out),
        _flow(theory, out),
        _spectra(theory, config, out),
        _betas(theory, out),
    ]


def _depth(depth: list[Depth], config: Any, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for index, (seed, run) in enumerate(zip(config.layer_seeds, depth)):
            layers = range(len(run.nc1))
            ax.semilogy(layers, run.nc1_tilde, "o-", color=f"C{index}", label=f"NC1~, seed {seed}")
            ax.semilogy(layers, run.nc1, "s--", color=f"C{index}", label=f"NC1, seed {seed}", alpha=0.7)
        ax.set_xlabel("hidden layers, each trained on the frozen ones before it (0: the input)")
        ax.set_ylabel("within-class variability")
        ax.set_xticks(list(range(config.layers + 1)))
        ax.legend()

    first, last = depth[0].nc1_tilde[0], depth[0].nc1_tilde[-1]
    shown = picture(
        draw,
        alt=f"Lines of NC1 and NC1~ over the number of layers; NC1~ goes from {first:.2f} at the input to {last:.2f}.",
        caption="Within-class variability of the deepest features as layers are added and trained one by one.",
    )
    return save(shown, out, "layerwise")


def _decay(ends: dict[str, dict[str, Collapsed]], out: Path) -> Figure:
    def draw(axes: Any) -> None:
        for row, (loss, found) in enumerate(ends.items()):
            for ax, (metric, name) in zip(axes[row], (("nc1_tilde", "NC1~"), ("nc1", "NC1"), ("nc2", "NC2"))):
                base = getattr(found["baseline"], metric)
                others = [s for s in found if s != "baseline"]
                change = [100 * (getattr(found[s], metric) / base - 1) for s in others]
                colours = ["C0" if "features" in s else "C7" for s in others]
                ax.barh(others[::-1], change[::-1], color=colours[::-1])
                ax.axvline(0, color="C7", linewidth=0.8)
                ax.set_title(f"{name}, {LOSSES[loss]}")
                ax.set_xlabel("change against the baseline, %")
                if metric != "nc1_tilde":
                    ax.set_yticklabels([])

    shown = picture(
        draw,
        alt="Bars of the relative change of NC1~, NC1 and NC2 for doubled and no weight decay of the feature layers and of the last layer.",
        caption="What weight decay does to collapse: the feature layers' (coloured) and the last layer's (grey).",
        size=(8.4, 2.3 * len(ends)),
        panels=(len(ends), 3),
    )
    return save(shown, out, "weight-decay")


def _flow(theory: Theory, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for name, label, style in (
            ("nc1_tilde", "NC1~", "-"),
            ("scaled_within", "exp(2 λ_H t) tr S_W", "--"),
            ("scaled_between", "exp(2 λ_H t) tr S_B", ":"),
        ):
            curve = getattr(theory, name)
            ax.semilogy(theory.times.numpy(), (curve / curve[0]).numpy(), style, label=label)
        ax.set_xlabel("time of the flow, t ~ 1/β")
        ax.set_ylabel("relative to the start")
        ax.legend()

    shown = picture(
        draw,
        alt="NC1~ and the scaled within-class trace fall along the flow, the scaled between-class trace rises.",
        caption="Gradient flow on the central path: the three monotone quantities of the theorem.",
    )
    return save(shown, out, "central-path")


def _spectra(theory: Theory, config: Any, out: Path) -> Figure:
    def draw(ax: Any) -> None:
        for index, s in enumerate(theory.near):
            ranks = range(1, len(s.block) + 1)
            label = f"λ_H = {s.lambda_h:g}"
            ax.plot(ranks, s.block.numpy(), ".", color=f"C{index}", label=label, markersize=6)
            ax.plot(ranks, s.block_closed.numpy(), "-", color=f"C{index}", linewidth=1, drawstyle="steps-mid")
        ax.set_xlabel("index of the singular value")
        ax.set_ylabel("singular value of the block F_kk")
        ax.legend()

    shown = picture(
        draw,
        alt="Descending singular values for several feature regularisations: dots of the matrix lie on the steps of the closed form.",
        caption=f"Spectrum near collapse (K = 4, d = 10, n = 10, β = {config.beta:g}, λ_W = {config.lambda_w:.3g}): "
        "dots from the matrix, lines from the closed form. Stronger feature regularisation attenuates more.",
    )
    return save(shown, out, "spectrum")


def _betas(theory: Theory, out: Path) -> Figure:
    gains = [1 - ratio / float(theory.nc1_tilde[0]) for ratio in theory.ratios]

    def draw(ax: Any) -> None:
        ax.loglog(theory.betas, gains, "o-")
        ax.set_xlabel("β, the weight of staying near H0")
        ax.set_ylabel("fall of NC1~ from that of H0, relative")

    shown = picture(
        draw,
        alt="On logarithmic axes the relative fall of NC1~ is positive for every beta and shrinks like 1/beta.",
        caption="How much less the minimiser varies within classes than the given features: for large β in proportion to 1/β.",
    )
    return save(shown, out, "beta")
