"""How much of its past does a language model need: what do the best blocks hold of its attention, and what does reading only these cost?

SSA's selection (Shen et al. 2026, arXiv 2511.20102) on the model as it is: the text is the prompts, joined by line breaks, in windows. Of full attention no
weights are kept; the rise of perplexity at each budget is measured by running the model so, and by running one layer so at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, percent, percent_interval
from lineament.audit.subject import LanguageSubject
from lineament.core.checks import InputError
from lineament.core.models import device_of, frozen
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain

TITLE = "How much of its past does it need?"
HELP = "how much of its past a language model needs, and what reading only the best blocks costs"
ORDER = 85
LANGUAGE = True
OPTIONAL = True
METHOD = "ssa"
# Tokens of a window at most and at least, windows, and blocks of a window.
_LONGEST, _SHORTEST, _WINDOWS, _BLOCKS = 2048, 256, 4, 64
# A rise of perplexity that is called small.
_SMALL = 0.01


@dataclass(frozen=True)
class Budget:
    """The best ``blocks`` of a window's: the mean weight they hold, the perplexity with only these, and its rise with a 95 % interval over windows."""

    blocks: int
    kept: float
    perplexity: float
    rise: tuple[float, float, float]


@dataclass(frozen=True)
class Layer:
    """A layer's means over tokens, heads and windows; ``rise``: of perplexity where this layer alone reads only the best blocks."""

    layer: int
    kept: Sequence[float]
    entropy_bits: float
    first: float
    peak: float
    reach: Sequence[int]
    rise: float


@dataclass(frozen=True)
class Need:
    """What the model needs of its past; ``chosen``: the budget that the sentence and the layers are about."""

    tokens: int
    windows: int
    block_size: int
    count: int
    perplexity: float
    budgets: Sequence[Budget]
    chosen: Budget
    layers: Sequence[Layer]
    left: Sequence[int]

    @property
    def needy(self) -> list[Layer]:
        """The layers that alone raise perplexity by more than a little."""
        return [each for each in self.layers if each.rise > _SMALL]

    @property
    def little(self) -> bool:
        """Whether the chosen budget costs little, as far as the windows can tell."""
        high = self.chosen.rise[2]
        return (high if math.isfinite(high) else self.chosen.rise[0]) < _SMALL


def applies(subject: LanguageSubject) -> str:
    from lineament.modules.sparse_attention.hf import attention_modules, kept_layers

    if not subject.decoder_only:
        return "It is an encoder-decoder, of which not all attention is causal."
    try:
        kept_layers(attention_modules(subject.model))
    except InputError as error:
        return f"Its attention cannot be run on blocks: {error}."
    length, most = len(_ids(subject)), _longest(subject)
    if most < _SHORTEST:
        return f"It takes no more than {most} tokens, where blocks mean little; {_SHORTEST} are needed."
    return (
        "" if length >= _SHORTEST else f"The prompts have {length} tokens together; {_SHORTEST} are needed."
    )


def look(subject: LanguageSubject) -> Section:
    found = _found(subject)
    chosen = found.chosen
    whole = _named(found.needy)
    sentence = (
        f"With the best {chosen.blocks} of {found.count} blocks of {found.block_size} tokens, which hold {percent(chosen.kept)} of its attention (mean over layers, heads and tokens), "
        f"perplexity goes from {compact(found.perplexity)} to {compact(chosen.perplexity)}, a change of {_signed(chosen.rise)} ({found.windows} window{'s' * (found.windows > 1)} of {found.tokens:,} tokens"
        f"{', 95 % interval over windows' if found.windows > 1 else ''}). "
        + (
            f"{whole} alone raise{'s' * (len(found.needy) == 1)} it by more than {percent(_SMALL, 0)}."
            if whole
            else f"No layer alone raises it by more than {percent(_SMALL, 0)}."
        )
    )
    if found.left:
        sentence += (
            f" {len(found.left)} layer{'s' * (len(found.left) > 1)} with a sliding window stay as they are."
        )
    return Section(
        status="good" if found.little else "note",
        number=percent(chosen.rise[0]),
        unit=f"change of perplexity with {chosen.blocks} of {found.count} blocks",
        sentence=sentence,
        pictures=[_map(found), _curve(found)],
        tables=[_by_budget(found), _by_layer(found)],
        numbers=plain(found),
        findings=[_finding(found)],
    )


def _signed(rise: tuple[float, float, float]) -> str:
    return percent_interval(rise) if math.isfinite(rise[1]) else percent(rise[0])


def _named(layers: Sequence[Layer]) -> str:
    numbers = [str(each.layer) for each in layers]
    if not numbers:
        return ""
    return f"Layer {numbers[0]}" if len(numbers) == 1 else f"Layers {', '.join(numbers[:-1])} and {numbers[-1]}"  # fmt: skip


def _ids(subject: LanguageSubject) -> Tensor:
    text = "\n".join(subject.prompts.prompts)
    return torch.tensor(subject.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _longest(subject: LanguageSubject) -> int:
    return min(_LONGEST, getattr(subject.model.config, "max_position_embeddings", None) or 2**20)


@torch.no_grad()
def _found(subject: LanguageSubject) -> Need:
    from lineament.modules.sparse_attention.hf import sparse_attention
    from lineament.modules.sparse_attention.probe import attention_report

    ids = _ids(subject)
    length = min(_longest(subject), len(ids))
    size = max(1, 2 ** (length // _BLOCKS).bit_length() // 2)
    count = -(-length // size)
    budgets = sorted({max(1, count // share) for share in (32, 16, 8, 4, 2)})
    middle = max(1, count // 8)
    windows = ids[: len(ids) // length * length].reshape(-1, length)[:_WINDOWS].to(device_of(subject.model))
    reports = [attention_report(subject.model, row[None], block_size=size, blocks=budgets) for row in windows]
    layers = [each.layer for each in reports[0]]
    with frozen(subject.model), sparse_attention(subject.model, block_size=size, mode="full") as budget:
        total = 1 + max([*layers, *budget.kept])
        full = _losses(subject.model, windows)
        budget.mode = "sparse"
        losses = {}
        for blocks in budgets:
            budget.blocks = blocks
            losses[blocks] = _losses(subject.model, windows)
        budget.blocks, alone = middle, {}
        for layer in layers:
            budget.mode = ["sparse" if n == layer else "full" for n in range(total)]
            alone[layer] = float((_losses(subject.model, windows[:2]) - full[:2]).mean().exp() - 1)
        left = budget.kept

    def mean(layer: int, name: str) -> Tensor:
        return torch.stack([getattr(report[layer], name).double().cpu() for report in reports]).mean(0)

    kept = torch.stack([mean(place, "kept") for place in range(len(layers))])
    found = [
        Budget(
            blocks, float(kept[:, place].mean()), float(losses[blocks].mean().exp()), _rise(losses[blocks] - full)
        )
        for place, blocks in enumerate(budgets)
    ]  # fmt: skip
    each = [
        Layer(
            layer,
            kept[place, budgets.index(middle)].tolist(),
            float(mean(place, "entropy").mean() / math.log(2)),
            float(mean(place, "first").mean()),
            float(mean(place, "peak").mean()),
            reports[0][place].reach.tolist(),
            alone[layer],
        )
        for place, layer in enumerate(layers)
    ]
    chosen = found[budgets.index(middle)]
    return Need(length, len(windows), size, count, float(full.mean().exp()), found, chosen, each, left)


def _rise(differences: Tensor) -> tuple[float, float, float]:
    mean, low, high = mean_interval(differences)
    return math.expm1(mean), (math.expm1(low) if math.isfinite(low) else low), (math.expm1(high) if math.isfinite(high) else high)  # fmt: skip


def _losses(model: Any, windows: Tensor) -> Tensor:
    """The mean loss of each window's tokens but its first, nats."""
    found = []
    for row in windows:
        scores = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(scores, row[1:]))
    return torch.stack(found).double().cpu()


def _finding(found: Need) -> Finding:
    chosen = found.chosen
    told = (
        f"Reading only the best {chosen.blocks} of {found.count} blocks of its past changes perplexity by {_signed(chosen.rise)} on {found.windows} "
        f"window{'s' * (found.windows > 1)} of {found.tokens:,} tokens"
    )
    if found.little:
        return Finding("good", f"{told}.", advice=f"Long texts may be run with sparse_attention(model, block_size={found.block_size}, blocks={chosen.blocks}).", key="little of the past is needed")  # fmt: skip
    if found.needy:
        one, named = len(found.needy) == 1, _named(found.needy)
        told += f"; {named[0].lower()}{named[1:]} alone cost{'s' * one} more than {percent(_SMALL, 0)}"
    return Finding("note", f"{told}.", key="much of the past is needed")


def _by_budget(found: Need) -> Table:
    return Table(
        f"By budget, of {found.count} blocks of {found.block_size} tokens",
        ("blocks", "of its attention", "perplexity", "change", "95 % interval"),
        [
            (
                each.blocks,
                percent(each.kept),
                compact(each.perplexity),
                percent(each.rise[0], 2),
                f"{percent(each.rise[1], 2)} to {percent(each.rise[2], 2)}" if math.isfinite(each.rise[1]) else None,
            )
            for each in found.budgets
        ]
        + [("all", percent(1.0), compact(found.perplexity), None, None)],
    )  # fmt: skip


def _by_layer(found: Need) -> Table:
    return Table(
        f"By layer, with {found.chosen.blocks} blocks (means over heads; change of perplexity where this layer alone reads only these, on at most 2 windows)",
        ("layer", "blocks hold", "least of a head", "on token 0", "on the strongest token", "entropy, bits", "half lies within", "change"),
        [
            (
                each.layer,
                percent(sum(each.kept) / len(each.kept)),
                percent(min(each.kept)),
                percent(each.first),
                percent(each.peak),
                compact(each.entropy_bits),
                f"{max(each.reach):,} tokens",
                percent(each.rise, 2),
            )
            for each in found.layers
        ],
    )  # fmt: skip


def _map(found: Need) -> Picture:
    values = [list(each.kept) for each in found.layers]

    def draw(ax: Any) -> None:
        image = ax.imshow([[100 * x for x in row] for row in values], cmap=shades(ax, "C0"), vmin=0, vmax=100, aspect="auto")  # fmt: skip
        ax.set(xlabel="head", ylabel="layer")
        ax.set_yticks(range(len(values)), [str(each.layer) for each in found.layers])
        ax.figure.colorbar(image, label="%")

    least = min(found.layers, key=lambda each: min(each.kept))
    return picture(
        draw,
        size=(6.4, 1.6 + 0.22 * len(values)),
        caption=f"What the best {found.chosen.blocks} of {found.count} blocks hold of each head's full attention.",
        alt=f"A map of held attention by layer and head; the least is {percent(min(least.kept))}, in layer {least.layer}.",
    )


def _curve(found: Need) -> Picture:
    def draw(ax: Any) -> None:
        ax.plot([each.blocks for each in found.budgets], [100 * each.rise[0] for each in found.budgets], "o-", color="C0")  # fmt: skip
        ax.axhline(0, color="C7", linewidth=1)
        ax.set(xscale="log", xlabel=f"blocks of {found.block_size} tokens", ylabel="change of perplexity, %")
        ax.set_xticks([each.blocks for each in found.budgets], [str(each.blocks) for each in found.budgets])

    return picture(
        draw,
        size=(6.4, 2.8),
        caption="What reading only the best blocks costs.",
        alt="Change of perplexity by budget: " + ", ".join(f"{each.blocks} blocks {percent(each.rise[0])}" for each in found.budgets) + ".",
    )  # fmt: skip
