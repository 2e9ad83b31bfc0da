"""Do two networks give the same answers, and err alike? For classes, values and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.phrases import compact, percent
from lineament.core import shards
from lineament.core.models import decided, device_of, frozen, logits
from lineament.core.statistics.shares import wilson
from lineament.load.model_and_data import ModelAndData
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import printable

_COLUMNS = ("", "samples", "A right", "B right", "same answer", "both wrong")


def answers(a: ModelAndData, b: ModelAndData) -> Section:
    title = "How often do they agree, and do they err alike?"
    if a.task != "classification" or b.task != "classification" or a.outputs.shape[1] < 2:
        return _other_answers(a, b, title)
    said = [decided(each.outputs) for each in (a, b)]
    right = [answer == each.targets for answer, each in zip(said, (a, b))]
    n = len(a)
    # Where the networks number the classes differently, b's answers are read as a's numbers by the labels that belong together.
    same = dict(zip(b.targets.tolist(), a.targets.tolist()))
    answer_b = torch.tensor([same.get(label, -1) for label in said[1].tolist()])
    agree = said[0] == answer_b
    both = ~right[0] & ~right[1]
    shares = [_share(each) for each in (*right, agree)]
    classes = sorted(set(a.targets.tolist()))
    inside = [a.targets == label for label in classes]
    expected = sum(
        float((~right[0][i]).double().mean() * (~right[1][i]).double().mean()) * int(i.sum()) for i in inside
    )
    rows = [_row(a.class_name(label), i, right, agree) for label, i in zip(classes, inside)]
    tables = [Table("By class", _COLUMNS, rows)]
    if a.samples.groups is not None:
        groups = a.samples.groups
        kinds = sorted(set(groups.tolist()))
        names = a.samples.group_names
        rows = [_row(names[k] if k < len(names) else str(k), groups == k, right, agree) for k in kinds]
        tables.append(Table("By group", _COLUMNS, rows))
    parted = (~agree).nonzero().flatten()
    sure = torch.minimum(*[each.outputs.softmax(1).amax(1) for each in (a, b)])[parted]
    order = parted[sure.argsort(descending=True)][:10]
    tables.append(
        Table(
            "Where they part, the surest first",
            ("sample", "label", "A says", "B says"),
            [
                (
                    int(a.samples.index[row]),
                    a.class_name(int(a.targets[row])),
                    a.class_name(int(said[0][row])),
                    b.class_name(int(said[1][row])),
                )
                for row in order.tolist()
            ],
        )
    )
    text = (
        f"Over {n:,} samples A is right on {_told(shares[0])} and B on {_told(shares[1])}. They give the same answer on {_told(shares[2])}. "
        f"Both are wrong on {int(both.sum()):,} samples; if each erred independently within a class, that would be {compact(expected)}."
    )
    gap = abs(shares[0][0] - shares[1][0])
    pictures = []
    if a.images and len(order):
        pictures.append(_parted(a, b, order[:6], said))
    return Section(
        title=title,
        status="note" if gap > 0.05 else "good",
        number=percent(shares[2][0]),
        unit="of the answers are the same",
        sentence=text,
        pictures=pictures,
        tables=tables,
        method="",
        numbers={
            "count": n,
            "accuracy_a": shares[0],
            "accuracy_b": shares[1],
            "agreement": shares[2],
            "both_wrong": int(both.sum()),
            "both_wrong_expected": expected,
        },
        findings=[Finding("note" if gap > 0.05 else "good", text, key="answers")],
    )


def _row(name: str, inside: Tensor, right: Sequence[Tensor], agree: Tensor) -> tuple[Any, ...]:
    both = (~right[0] & ~right[1])[inside]
    values = [percent(float(each[inside].double().mean())) for each in (*right, agree)]
    return (name, int(inside.sum()), *values, int(both.sum()))


def _share(values: Tensor) -> tuple[float, float, float]:
    hits, total = int(values.sum()), len(values)
    return hits / total, *wilson(hits, total)


def _told(share: tuple[float, float, float]) -> str:
    return f"{percent(share[0])} (95 % interval {percent(share[1])} to {percent(share[2])})"


def _other_answers(a: ModelAndData, b: ModelAndData, title: str) -> Section:
    """Several labels, or values: the losses, and how their outputs go together."""
    losses = [each.losses(each.outputs, each.targets) for each in (a, b)]
    means = [(float(v.double().mean()), 1.96 * float(v.double().std()) / len(v) ** 0.5) for v in losses]
    alike = None
    if a.outputs.shape == b.outputs.shape:
        x, y = (v.double() - v.double().mean(0) for v in (a.outputs, b.outputs))
        scale = (x.square().sum() * y.square().sum()).sqrt()
        alike = float((x * y).sum() / scale) if float(scale) > 0 else 0.0
    text = (
        f"Over {len(a):,} samples A's mean loss is {compact(means[0][0])} ± {compact(means[0][1])} and B's {compact(means[1][0])} ± {compact(means[1][1])}"
        + ("." if alike is None else f"; their outputs correlate at {compact(alike)}.")
    )
    return Section(
        title=title,
        status="good",
        number="–" if alike is None else compact(alike),
        unit="correlation of the outputs",
        sentence=text,
        method="",
        numbers={"loss_a": means[0], "loss_b": means[1], "correlation": alike},
        findings=[Finding("good", text, key="answers")],
    )


def text_losses(models: Sequence[nn.Module], tokenizers: Sequence[Any], texts: Sequence[str]) -> Section:
    """How well each predicts the texts, in bits a character, which tokenizers have in common."""
    title = "How well does each predict the texts?"
    bits = [_bits(model, tokenizer, texts) for model, tokenizer in zip(models, tokenizers)]
    length = torch.tensor([len(text) for text in texts]).double()
    means, errors = [], []
    for each in bits:
        rate = float(each.sum() / length.sum())
        means.append(rate)
        errors.append(1.96 * float((each - rate * length).std() / length.mean()) / len(texts) ** 0.5)
    x, y = bits[0] / length, bits[1] / length
    alike = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if len(texts) > 2 else 0.0
    text = (
        f"Over {len(texts):,} texts A needs {compact(means[0])} ± {compact(errors[0])} bits a character (first tokens left out) and B "
        f"{compact(means[1])} ± {compact(errors[1])}; from text to text these correlate at {compact(alike)}."
    )
    return Section(
        title=title,
        status="good",
        number=f"{compact(means[0])} / {compact(means[1])}",
        unit="bits a character, A / B",
        sentence=text,
        method="",
        numbers={"bits_a": means[0], "bits_b": means[1], "errors": errors, "correlation": alike},
        findings=[Finding("good", text, key="answers")],
    )


def _bits(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    def of(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=device_of(model))
        if ids.shape[1] < 2:
            return 0.0
        scores = logits(model(ids))[0, :-1].double().log_softmax(-1)
        return -float(scores.gather(1, ids[0, 1:, None]).sum()) / 0.6931471805599453

    with frozen(model), torch.no_grad():
        return torch.tensor(shards.each(texts, of, "losses of texts"), dtype=torch.float64)


def _parted(a: ModelAndData, b: ModelAndData, rows: Tensor, said: Sequence[Tensor]) -> Picture:
    shown = rows.tolist()

    def words(row: int) -> str:
        names = (each.class_name(int(answer[row])) for each, answer in zip((a, b), said))
        return " / ".join(printable(name, limit=12) for name in names)

    def draw(axes: Any) -> None:
        for panel, row in zip(list(axes[0]) if len(shown) > 1 else [axes], shown):
            image = a.display(row).numpy()
            panel.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
            panel.set_axis_off()
            panel.set_title(words(row), fontsize=8)

    return picture(
        draw,
        panels=(1, len(shown)),
        size=(1.25 * len(shown), 1.6),
        kind="png",
        caption="Samples on which the answers part, the surest first: what A says / what B says.",
        alt="Samples with the answers of A and B: " + "; ".join(words(row) for row in shown) + ".",
    )
