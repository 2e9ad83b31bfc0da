"""How much of its past does a language model need, and which of its layers need all of it?

Each query reads its own block of the past and the best of those before it (Shen et al. 2026, arXiv 2511.20102): in all layers at several budgets, and in
one layer alone. Beside that: what the best blocks hold of full attention, attention sinks and reach, by layer and head. Weights are built a few queries at
a time, never for all pairs of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lineament.audit.phrases import compact, mean_interval, percent, spread
from lineament.audit.subject import LanguageSubject
from lineament.core import shards
from lineament.core.checks import InputError
from lineament.core.models import device_of, frozen
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain

TITLE = "How much of its past does it need?"
HELP = "how much of its past a language model needs, and which layers need all of it"
ORDER = 85
LANGUAGE = True
METHOD = "ssa"
OPTIONAL = True
# Tokens of a window, windows, logits of one window, and what the forward passes may cost.
_SHORTEST, _LONGEST, _WINDOWS, _LOGITS, _FLOPS = 128, 8192, 8, 2**28, 3e13
# A layer needs its past where its budget alone costs more than this share of perplexity.
_MUCH = 0.01


@dataclass(frozen=True)
class Attention:
    """What sparse attention costs, and where full attention lies; ``blocks`` are the budgets, of ``count`` blocks in a window.

    ``loss``: nats a token, [windows]; ``rise``: with each budget, [budgets, windows]; ``divergence``: KL of the predictions; ``layer_rise``: one layer
    alone at ``blocks[budget]``. ``best``: what the best blocks hold, [layers, heads, budgets]; ``first``: the weight on the first token;
    ``reach``: the newest tokens that hold 90 % of the rest; ``entropy`` in bits, [layers, heads] each. ``quarters``: the loss with the whole past in each
    quarter of a window, [4, windows].
    """

    windows: int
    tokens: int
    block_size: int
    count: int
    blocks: Sequence[int]
    budget: int
    loss: Tensor
    rise: Tensor
    divergence: Tensor
    layers: Sequence[int]
    layer_rise: Tensor
    best: Tensor
    first: Tensor
    first_block: Tensor
    reach: Tensor
    entropy: Tensor
    quarters: Tensor

    @property
    def chosen(self) -> int:
        """The budget that the sentence speaks of."""
        return self.blocks[self.budget]

    @property
    def better(self) -> int | None:
        """The budget with which perplexity is lowest, by its place, where it is lower than with the whole past whatever of that is chance."""
        best = int(self.rise.mean(1).argmin())
        value, _, high = _rises(self.rise[best], len(self.blocks))
        return best if high < 0 or (self.windows == 1 and value < -_MUCH) else None

    @property
    def needy(self) -> list[int]:
        """The layers that alone, at that budget, cost more than one percent, whatever of them is chance."""
        found = [(layer, _rises(row, len(self.layers))) for layer, row in zip(self.layers, self.layer_rise)]
        return [layer for layer, (_, low, _) in found if low > _MUCH]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "chosen": self.chosen, "better": self.better, "needy": self.needy}


def applies(subject: LanguageSubject) -> str:
    from lineament.modules.sparse_attention.hf import attention_modules, kept_layers

    try:
        kept_layers(attention_modules(subject.model))
    except InputError as error:
        return f"Its attention cannot be made sparse: {error}."
    if _windows(subject) is None:
        return f"It needs a text (`text`) or prompts of at least {_SHORTEST} tokens."
    return ""


def look(subject: LanguageSubject) -> Section:
    windows = _windows(subject)
    assert windows is not None
    found = shards.agreed("attention", lambda: _measured(subject, windows))
    ratio = _rises(found.rise[found.budget])
    enough = ratio[2] <= _MUCH
    needy = found.needy
    share = f"{found.chosen} of {found.count} blocks of {found.block_size} tokens"
    sentence = (
        f"Where each query reads only {share}, its perplexity {_changed(ratio)}, on {_counted(found)} "
        f"({compact(math.exp(float(found.loss.mean())))} with its whole past). "
    )
    if needy:
        one = len(needy) == 1
        sentence += f"{'Layer' if one else 'Layers'} {_listed(needy)} {'needs its' if one else 'need their'} whole past: alone on that budget {'it costs' if one else 'each costs'} more than {percent(_MUCH)}. "
    elif len(found.loss) > 1:
        sentence += f"No layer alone is shown to cost more than {percent(_MUCH)} on that budget. "
    misled = _misled(found)
    sentence += "".join(f"{one.sentence} " for one in misled)
    held, sink = found.best[..., found.budget], found.first
    by_layer = held.mean(1)
    sentence += (
        f"The best {found.chosen} blocks hold {percent(float(held.mean()))} of the attention (from {percent(float(by_layer.min()))} in layer "
        f"{found.layers[int(by_layer.argmin())]} to {percent(float(by_layer.max()))} in layer {found.layers[int(by_layer.argmax())]}), the first token {percent(float(sink.mean()))}; of the rest "
        f"90 % lies within the last {compact(float(found.reach.double().median()))} tokens (median of {found.reach.numel()} heads)."
    )
    left = len({*range(_layers(subject))} - {*found.layers})
    if left:
        sentence += f" {left} layer{'s' if left > 1 else ''} with a sliding window stayed as {'they are' if left > 1 else 'it is'}."
    return Section(
        status="good" if enough else "note",
        number=_signed(ratio[0]),
        unit=f"perplexity with {found.chosen} of {found.count} blocks",
        sentence=sentence,
        pictures=[_curve(found), _heads(found)],
        tables=[_budgets(found), _by_layer(found)],
        numbers=plain(found),
        findings=[
            Finding(
                "good" if enough else "note",
                f"With {share} its perplexity {_changed(ratio)}.",
                advice=f"Run it inside `sparse_attention(model, block_size={found.block_size}, blocks={found.chosen})` of `lineament.modules.sparse_attention`: it reads that much of its past."
                if enough
                else "Training on with aligned attention (`lineament train MODEL TEXT --ssa`) can lower this cost."
                if ratio[1] > 0
                else "Give a longer text: on so few windows this may be chance.",
                key="part of the past is enough" if enough else "past needed",
            ),
            *misled,
        ],
    )


def _misled(found: Attention) -> list[Finding]:
    """What is said where reading less of the past makes the predictions better: whether the loss grows along a window, as it does beyond the length of training."""
    if found.better is None:
        return []
    first, *_, last = found.quarters
    value, low, _ = mean_interval(last - first, _student(len(first)))
    told = (
        f"With {found.blocks[found.better]} of {found.count} blocks its perplexity falls by {percent(-_rises(found.rise[found.better])[0])}: what is left out misleads it. "
        f"With its whole past its loss is {compact(float(first.mean()))} nats in the first quarter of a window of {found.tokens:,} tokens and {compact(float(last.mean()))} in the last"
    )
    if low > 0 or (len(first) == 1 and value > 0):
        return [
            Finding(
                "note",
                f"{told}, as where a network is read beyond the length that it was trained at.",
                advice="Give prompts as long as the sequences of its training, without a text: what a sparse past costs there is another question.",
                key="misled by its past",
            )
        ]
    return [
        Finding(
            "note",
            f"{told}, which does not speak for windows beyond the length that it was trained at.",
            key="misled by its past",
        )
    ]


def _measured(subject: LanguageSubject, windows: Tensor) -> Attention:
    from lineament.modules.sparse_attention.cost import sparse_cost
    from lineament.modules.sparse_attention.profile import attention_profiles

    tokens = windows.shape[1]
    size = 64 if tokens >= 2048 else 16
    count = -(-tokens // size)
    blocks = sorted({max(1, count // part) for part in (32, 16, 8, 4, 2)})
    budget = blocks.index(max(1, count // 8))
    cost = sparse_cost(
        subject.model, windows, block_size=size, blocks=blocks, layer_blocks=max(1, count // 8)
    )
    rows: dict[str, list[Tensor]] = {}
    away, quarters = None, []
    with frozen(subject.model, requires_grad=None):
        for ids in windows.to(device_of(subject.model)).split(1):
            found = attention_profiles(subject.model, ids, block_size=size, blocks=blocks).values()
            for name in ("best", "first", "first_block", "bits"):
                rows.setdefault(name, []).append(
                    torch.stack([getattr(each, name)[0].double().cpu() for each in found])
                )
            one = torch.stack([each.away[0].double().cpu() for each in found])
            away = one if away is None else away + one
            quarters.append(_quarters(subject.model, ids))
    assert away is not None
    held = away.cumsum(-1)
    reach = (held < 0.9 * held[..., -1:] - 1e-9).sum(-1) + 1
    best, first, first_block, bits = (torch.stack(rows[name]).mean(0) for name in rows)
    return Attention(
        len(windows), tokens, size, count, blocks, budget, cost.full, cost.rise, cost.divergence, cost.layers, cost.layer_rise,
        best, first, first_block, reach, bits, torch.stack(quarters, 1),
    )  # fmt: skip


@torch.no_grad()
def _quarters(model: Any, ids: Tensor) -> Tensor:
    """The loss with the whole past in each quarter of a window, a few tokens at a time, [4]."""
    logits, following = model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]
    step = max(1, 2**24 // logits.shape[1])
    losses = [
        cross_entropy(some.float(), words, reduction="none")
        for some, words in zip(logits.split(step), following.split(step))
    ]
    return torch.stack([part.double().mean() for part in torch.cat(losses).cpu().tensor_split(4)])


def _windows(subject: LanguageSubject) -> Tensor | None:
    """Windows of one length, that which reads most of the texts, [windows, tokens]."""
    config = subject.model.config
    texts = [subject.text] if subject.text else list(subject.prompts.prompts)
    start = _start(subject.tokenizer)
    ids = [list(subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]  # fmt: skip
    vocabulary = max(1, getattr(config, "vocab_size", 1))
    room = min(_LONGEST, getattr(config, "max_position_embeddings", None) or _LONGEST, _LOGITS // vocabulary)
    room -= len(start)
    lengths = {min(len(one), room) for one in ids}
    lengths = {length for length in lengths if length + len(start) >= _SHORTEST}
    if not lengths:
        return None
    weights = sum(p.numel() for p in subject.model.parameters())
    passes = 8 + _layers(subject)

    def affordable(length: int) -> int:
        return int(_FLOPS / (2 * weights * length * passes))

    length = max(lengths, key=lambda n: (n * min(sum(len(one) // n for one in ids), _WINDOWS), n))
    while affordable(length) < 2 and length >= 4 * _SHORTEST:
        length //= 2
    found = [one[at : at + length] for one in ids for at in range(0, len(one) - length + 1, length)]
    most = max(2, min(_WINDOWS, affordable(length)))
    return torch.tensor([start + found[i] for i in spread(len(found), most)])


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text."""
    first = getattr(tokenizer, "bos_token_id", None)
    return [first] if first is not None and list(tokenizer("a")["input_ids"])[:1] == [first] else []


def _layers(subject: LanguageSubject) -> int:
    from lineament.modules.sparse_attention.hf import attention_modules

    return len(attention_modules(subject.model))


def _rises(row: Tensor, compared: int = 1) -> tuple[float, float, float]:
    """The ratio of perplexities less 1, with its 95 % interval over windows by Student's t, wider where several are compared."""
    mean, low, high = mean_interval(row, _student(len(row), compared))
    return math.expm1(mean), math.expm1(low), math.expm1(high)


def _student(windows: int, compared: int = 1) -> float:
    """How many standard errors a 95 % interval reaches to each side."""
    from scipy.stats import t

    return float(t.ppf(1 - 0.025 / compared, windows - 1)) if windows > 1 else math.inf


def _signed(ratio: float) -> str:
    return ("+" if ratio > 0 else "") + percent(ratio)


def _changed(ratio: tuple[float, float, float]) -> str:
    value, low, high = ratio
    text = f"changes by {_signed(value)}"
    return text + (
        f" (95 % interval {_signed(low)} to {_signed(high)})" if math.isfinite(high) else " (one window)"
    )


def _counted(found: Attention) -> str:
    return f"{found.windows} window{'s' if found.windows > 1 else ''} of {found.tokens:,} tokens"


def _listed(numbers: Sequence[int]) -> str:
    texts = [str(n) for n in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _curve(found: Attention) -> Picture:
    rises = [_rises(row) for row in found.rise]

    def draw(ax: Any) -> None:
        values = [100 * value for value, _, _ in rises]
        ax.axhline(0, color="C7", linewidth=0.8)
        if found.windows > 1:
            ax.fill_between(
                found.blocks, [100 * r[1] for r in rises], [100 * r[2] for r in rises], alpha=0.25, color="C0"
            )
        ax.plot(found.blocks, values, marker="o", color="C0")
        ax.set_xscale("log", base=2)
        ax.set(
            xlabel=f"blocks that a query reads, of {found.count}",
            ylabel="rise of perplexity, %",
            xticks=found.blocks,
            xticklabels=[str(b) for b in found.blocks],
        )

    return picture(
        draw,
        size=(6.4, 2.8),
        caption="What reading only the best blocks costs, with 95 % intervals over windows.",
        alt="Perplexity against blocks: "
        + ", ".join(f"{b} blocks {_signed(r[0])}" for b, r in zip(found.blocks, rises))
        + ".",
    )


def _heads(found: Attention) -> Picture:
    held = 100 * found.best[..., found.budget]

    def draw(ax: Any) -> None:
        drawn = ax.imshow(held.tolist(), aspect="auto", cmap=shades(ax, "C0"), vmin=0, vmax=100)
        ax.set(
            xlabel="head",
            ylabel="layer",
            yticks=range(len(found.layers)),
            yticklabels=[str(n) for n in found.layers],
        )
        ax.figure.colorbar(drawn, ax=ax, label="held, %")

    return picture(
        draw,
        size=(6.4, max(2.4, 1.2 + 0.22 * len(found.layers))),
        caption=f"How much of full attention the best {found.chosen} of {found.count} blocks hold, by layer and head.",
        alt=f"A map of {held.shape[0]} layers and {held.shape[1]} heads, from {float(held.min()):.0f} to {float(held.max()):.0f} %.",
    )


def _interval(row: Tensor) -> str:
    value, low, high = _rises(row)
    return f"{_signed(value)} ({_signed(low)} to {_signed(high)})" if math.isfinite(high) else _signed(value)


def _budgets(found: Attention) -> Table:
    return Table(
        f"Sparse attention in all layers, on {_counted(found)}",
        ("blocks", f"of {found.count}", "perplexity (95 % interval)", "KL of its predictions, nats", "held by the best blocks"),
        [
            (b, percent(b / found.count), _interval(rise), compact(float(kl.mean())), percent(float(found.best[..., i].mean())))
            for i, (b, rise, kl) in enumerate(zip(found.blocks, found.rise, found.divergence))
        ],
    )  # fmt: skip


def _by_layer(found: Attention) -> Table:
    return Table(
        "Layer by layer, means over heads",
        (
            "layer", f"best {found.chosen} blocks hold", "first token", "first block", "90 % of the rest within, tokens", "entropy, bits",
            f"perplexity with {found.chosen} blocks in this layer alone (95 % interval)",
        ),
        [
            (
                layer, percent(float(found.best[i, :, found.budget].mean())), percent(float(found.first[i].mean())),
                percent(float(found.first_block[i].mean())), compact(float(found.reach[i].double().mean())),
                compact(float(found.entropy[i].mean())), _interval(found.layer_rise[i]),
            )
            for i, layer in enumerate(found.layers)
        ],
    )  # fmt: skip
