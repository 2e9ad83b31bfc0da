"""How attributions to tokens are judged and shown, for language models and for text classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval
from lineament.explain.tokens.controls import random_importance
from lineament.explain.tokens.faithfulness import soft_faithfulness
from lineament.explain.tokens.results import TokenAttribution
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Picture
from lineament.report.text import printable

_SHOWN, _DRAWS = 6, 32
# The importances that are judged: ReAGent's, its values on other tokens, random ones.
JUDGED = {"ours": "ReAGent", "dealt": "its values on other tokens", "random": "random importances"}


def judged(
    model: Any, a: TokenAttribution, tokenizer: Any, seed: int, others: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Soft-NS and Soft-NC of the attribution, of its values on other tokens, of random importances, and of others by name."""
    generator = torch.Generator().manual_seed(seed)
    places = a.scored.nonzero()[:, 0]
    rows = [a.scores.double()]
    for _ in range(4):
        dealt = torch.zeros_like(rows[0])
        dealt[places] = rows[0][places[torch.randperm(len(places), generator=generator)]]
        rows.append(dealt)
    rows += list(random_importance(a.scored, seed=seed, draws=4))
    rows += [other.double() for other in (others or {}).values()]
    soft = soft_faithfulness(
        model,
        a.ids,
        # Of an encoder-decoder the decoder's start token has a score too, which is not used.
        torch.nn.functional.pad(torch.stack(rows).clamp(0, 1), (0, 1 if a.source else 0)),
        tokenizer=tokenizer,
        n_samples=_DRAWS,
        seed=seed,
    )
    found = {}
    for name, values in (("ns", soft.sufficiency), ("nc", soft.comprehensiveness)):
        found[f"{name}_ours"] = float(values[0])
        found[f"{name}_dealt"] = float(values[1:5].mean())
        found[f"{name}_random"] = float(values[5:9].mean())
        found |= {f"{name}_{other}": float(value) for other, value in zip(others or (), values[9:])}
    return found


def strips(found: Sequence[TokenAttribution], *, texts: bool = False) -> Picture:
    """A few prompts, or ``texts`` with their class, token by token: the fuller the colour, the more it matters."""
    shown = found[:_SHOWN]
    most = min(12, max(len(a.tokens) for a in shown))
    # Few columns have room for larger letters; the figure is shrunk to the page, and its letters with it.
    size = 10 if most <= 9 else 8.5

    def part(a: TokenAttribution) -> slice:
        """The end of a prompt; of a text, which has no next token, what is around its most important one."""
        first = max(len(a.tokens) - most, 0)
        return slice(min(max(int(a.scores.argmax()) - most // 2, 0), first) if texts else first, None)

    def draw(ax: Any) -> None:
        grid = torch.full((len(shown), most), torch.nan)
        for i, a in enumerate(shown):
            tail = a.scores[part(a)][:most]
            grid[i, most - len(tail) :] = tail / tail.max().clamp_min(1e-12)
        ax.imshow(grid.numpy(), cmap=shades(ax, "C1"), vmin=0, vmax=1, aspect="auto")
        for i, a in enumerate(shown):
            shown_tokens = a.tokens[part(a)][:most]
            for j, token in enumerate(shown_tokens):
                ax.text(
                    most - len(shown_tokens) + j,
                    i,
                    printable(token.strip() or "␣", limit=9),
                    ha="center",
                    va="center",
                    fontsize=size,
                    # On the full colour the page's own shade is the one that can be read.
                    color=ax.get_facecolor() if float(grid[i, most - len(shown_tokens) + j]) > 0.6 else None,
                )
        ax.set_yticks(
            range(len(shown)), [printable("→ " + a.target_text.strip(), limit=14) for a in shown], fontsize=9
        )
        ax.yaxis.tick_right()
        ax.set_xticks([] if texts else [0, most - 1], [] if texts else [f"{most} back", "last token"])
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)

    best = "; ".join(
        f"for {printable(a.target_text.strip(), limit=20)}: {printable(a.tokens[a.ranking()[0]].strip(), limit=20)}"
        for a in shown
    )
    return picture(
        draw,
        size=(9.6, 0.6 + 0.42 * len(shown)),
        caption=(
            f"Up to {most} tokens of {len(shown)} texts, around the most important, and, at the right, the class that the network names. "
            if texts
            else f"The last {most} tokens of {len(shown)} prompts and, at the right, the token that the model finds most probable next. "
        )
        + "The fuller a field's colour, the more its token decides.",
        alt=f"Tokens of {len(shown)} {'texts' if texts else 'prompts'} shaded by importance. The most important, {best}.",
    )


def bars(scores: Mapping[str, Tensor]) -> Picture:
    means = {k: [float(scores[f"{m}_{k}"].mean()) for m in ("ns", "nc")] for k in JUDGED}

    def draw(ax: Any) -> None:
        for k, (key, name) in enumerate(JUDGED.items()):
            ax.bar(
                [x + 0.27 * (k - 1) for x in range(2)],
                means[key],
                0.25,
                label=name,
                color=("C0", "C1", "C7")[k],
            )
        ax.set_xticks(range(2), ["sufficiency", "comprehensiveness"])
        ax.set(ylabel="soft normalised score")
        ax.legend()

    return picture(
        draw,
        size=(6.4, 3.0),
        caption="Is it true? Higher is truer in both. Its own values on other tokens are the fair rival: as peaked, but pointing elsewhere.",
        alt=f"Bars: sufficiency {means['ours'][0]:.3f} against {means['dealt'][0]:.3f} dealt at random; comprehensiveness {means['ours'][1]:.3f} against {means['dealt'][1]:.3f}.",
    )


def most_important(found: Sequence[TokenAttribution]) -> Table:
    """The tokens that decide most where they occur, over all prompts."""
    sums: dict[str, list[float]] = {}
    for a in found:
        for token, score, scored in zip(a.tokens, a.scores.tolist(), a.scored.tolist()):
            if scored:
                sums.setdefault(token, []).append(score * int(a.scored.sum()))
    ranked = sorted(sums.items(), key=lambda item: -sum(item[1]) / (len(item[1]) + 1))[:12]
    return Table(
        "Tokens that decide where they occur (1: as much as an average token of its text)",
        ["token", "occurrences", "mean weight"],
        [[repr(printable(token)), len(values), sum(values) / len(values)] for token, values in ranked],
    )


def judgement(scores: Mapping[str, Tensor], others: Mapping[str, str] | None = None) -> Table:
    rows = []
    for key, name in {**JUDGED, **(others or {})}.items():
        row: list[Any] = [name]
        for m in ("ns", "nc"):
            mean, low, high = mean_interval(scores[f"{m}_{key}"])
            row += [mean, f"{compact(low)} to {compact(high)}"]
        rows.append(row)
    columns = ["importances", "sufficiency", "95 % interval", "comprehensiveness", "95 % interval"]
    return Table(f"Soft faithfulness over {len(scores['ns_ours'])} texts", columns, rows)
