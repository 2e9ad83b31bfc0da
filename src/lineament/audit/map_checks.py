"""Are the saliency maps of an audit true? Scores without retraining for all, and DiffROAR, which retrains, on request.

Deletion and insertion (Petsiuk et al. 2018), infidelity and sensitivity (Yeh et al. 2019), beside the plain gradient and a random map; DiffROAR
(Shah et al. 2021, arXiv 2102.12781) retrains the audited architecture, freshly drawn, on what the maps keep of the audit's own samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.phrases import mean_interval, percent, spread
from lineament.audit.subject import Subject
from lineament.core.batching import chunked
from lineament.core.checks import InputError
from lineament.core.models import logits
from lineament.explain.faithfulness.deletion import DeletionInsertion, deletion_insertion
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.pixel_scores import MapScores, score_maps
from lineament.explain.faithfulness.retraining import DiffROAR, diffroar
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Picture
from lineament.train.stacked import Training

Explain = Callable[..., Tensor]
_TRUTH, _SCORED = 48, 32
# A gain that is shown as 0.00 says nothing of the maps, however narrow its interval.
_FAINT = 0.005
_FRACTIONS, _LEVEL = (1.0, 0.5, 0.2, 0.1), 0.1
# Few samples want more passes: about so many steps of the optimizer, within bounds.
_STEPS, _EPOCHS, _BATCH, _RATE, _WORK = 300, (15, 60), 64, 2e-3, 2e14


@dataclass(frozen=True)
class Truth:
    """Deletion and insertion of the maps and of random ones; ``gain``: the mean of the maps' lead with its 95 % interval."""

    curves: DeletionInsertion
    gain: tuple[float, float, float]

    @property
    def images(self) -> int:
        return len(self.curves.deletion)

    @property
    def faint(self) -> bool:
        """Whether the gain is no more than rounding."""
        return max(abs(end) for end in self.gain[1:]) < _FAINT

    @property
    def better_than_random(self) -> bool:
        """Whether the maps' order of pixels beats a random one by more than chance and more than rounding."""
        return self.gain[1] > 0 and not self.faint

    def to_dict(self) -> dict[str, Any]:
        return {**self.curves.to_dict(), "gain": list(self.gain), "images": self.images}

    def sentence(self, method: str) -> str:
        """What the gain says."""
        gain, low, high = self.gain
        interval = f"gain {gain:.2f}, 95 % interval {low:.2f} to {high:.2f}".replace("-", "−")
        if self.faint:
            return f"Whether the maps ({method}) are true cannot be told: the answers stay as sure whichever pixels are taken away ({interval})."
        if low > 0:
            return f"The maps ({method}) are truer than chance: taking pixels away or giving them back in their order beats a random order ({interval})."
        if high < 0:
            return f"The maps ({method}) mislead: a random order of pixels does better than theirs ({interval}), so do not read much into them."
        return f"Whether the maps ({method}) are truer than chance cannot be told from {self.images} images ({interval})."


def deletion_and_insertion(subject: Subject, rows: Tensor, maps: Tensor) -> Truth:
    """Deletion and insertion of the maps and of random ones, with the paired gain's interval."""
    count = subject.affordable(3e12, 90, most=_TRUTH, least=8)
    if subject.fixed_batch:
        count = max(subject.batch_size, count // subject.batch_size * subject.batch_size)
    chosen = torch.tensor(spread(len(rows), min(count, len(rows))))
    found = deletion_insertion(
        subject.model,
        subject.inputs(rows[chosen]),
        maps[chosen][:, None],
        subject.outputs[rows[chosen]].argmax(1),
        steps=min(20, maps.shape[-1] * maps.shape[-2]),
        seed=subject.seed,
        batch_size=subject.batch_size if subject.fixed_batch else "auto",
    )
    return Truth(found, mean_interval(found.gains.cpu()))


def scores(subject: Subject, rows: Tensor, explain: Explain) -> MapScores:
    """The chosen method, the plain gradient and a random map by the scores that need no retraining."""
    # About so many forwards an image: three methods by two curves, as many changes, and the maps of altered images.
    count = (
        subject.batch_size if subject.fixed_batch else subject.affordable(3e12, 250, most=_SCORED, least=8)
    )
    chosen = rows[torch.tensor(spread(len(rows), min(count, len(rows))))]
    x, target = subject.inputs(chosen), subject.outputs[chosen].argmax(1)
    reach = float(x.max() - x.min())

    def gradient(images: Tensor) -> Tensor:
        return input_gradient(subject.model, images, target, kind="logit_true").abs().sum(1, keepdim=True)

    return score_maps(
        subject.model,
        x,
        {f"{subject.method} (chosen)": lambda images: explain(images, target), "plain gradient": gradient},
        target,
        steps=min(10, x.shape[-1] * x.shape[-2]),
        samples=20,
        radius=max(0.02 * reach, 1e-6),
        perturbations=3,
        seed=subject.seed,
        batch_size=subject.batch_size if subject.fixed_batch else "auto",
    )


def scores_table(judged: MapScores) -> Table:
    """The scores with what is better said in the column's name."""
    names, lines = judged.table()
    told = [f"{n} ({'more' if more else 'less'} is better)" for n, more in judged.COLUMNS.values()]
    shown = [[line[0], *(None if v is None else round(v, 4) for v in line[1:])] for line in lines]
    return Table("Maps judged without retraining, beside a random map", [names[0], *told], shown)


@dataclass(frozen=True)
class Retrained:
    """DiffROAR of several attributions of the audited network, or the reason why there is none."""

    sentence: str
    found: dict[str, DiffROAR]

    def to_dict(self) -> dict[str, Any]:
        return {"sentence": self.sentence, **{name: each.to_dict() for name, each in self.found.items()}}

    def tables(self) -> list[Table]:
        rows = [
            [
                name,
                percent(k, 0),
                percent(float(each.kar[i])),
                percent(float(each.keep_bottom[i].mean())),
                f"{100 * float(each.mean[i]):+.1f}".replace("-", "−"),
                f"{100 * float(each.std[i]):.1f}",
            ]
            for name, each in self.found.items()
            for i, k in enumerate(each.fractions)
        ]
        if not rows:
            return []
        names = ["maps", "pixels kept", "accuracy, top kept", "bottom kept", "DiffROAR, points", "deviation"]
        return [Table("Retrained on what the maps keep (DiffROAR)", names, rows)]

    def pictures(self) -> list[Picture]:
        if not self.found:
            return []

        def draw(ax: Any) -> None:
            for k, (name, each) in enumerate(self.found.items()):
                at = [100 * f for f in each.fractions]
                color = "C7" if name == "random" else f"C{k}"
                ax.errorbar(
                    at,
                    (100 * each.mean).tolist(),
                    (100 * each.std).tolist(),
                    marker="o",
                    color=color,
                    label=name,
                )
            ax.axhline(0, color="C7", linewidth=0.8)
            ax.set(xlabel="pixels kept, %", ylabel="accuracy, top less bottom, points", xscale="log")
            ax.legend()

        told = ", ".join(
            f"{name} {100 * each.at(min(each.fractions)):+.1f}" for name, each in self.found.items()
        )
        return [
            picture(
                draw,
                size=(6.4, 3.2),
                caption="Fresh networks trained on what the maps call most important, less those trained on what they call least: "
                "above zero the maps mark what can be learned from.",
                alt=f"DiffROAR by share of pixels kept; at the smallest share, in points: {told}.",
            )
        ]


def retrained(subject: Subject, explain: Explain) -> Retrained:
    """DiffROAR of the chosen maps, of the plain gradient and of random maps, on the audit's own samples."""
    if subject.fresh is None:
        return Retrained(
            "DiffROAR does not apply: it trains the architecture anew, and an exported program or a network without a factory cannot be "
            "drawn anew; pass file.py:factory.",
            {},
        )
    order = torch.randperm(len(subject), generator=torch.Generator().manual_seed(subject.seed))
    cut = 2 * len(order) // 3
    first, second = order[:cut], order[cut:]
    x, x_test = (torch.cat([subject.inputs(p) for p in rows.split(512)]) for rows in (first, second))
    device = x.device
    y, y_test = subject.targets[first].to(device), subject.targets[second].to(device)
    width = subject.outputs.shape[1]
    # A forward and a backward are about three forwards.
    epochs = min(max(round(_STEPS * _BATCH / cut), _EPOCHS[0]), _EPOCHS[1])
    once = 3 * subject.flops * cut * epochs
    plan: tuple[Sequence[float], Sequence[int]] = (_FRACTIONS, (1, 2, 3))
    if once * 3 * 2 * len(_FRACTIONS) * 3 > _WORK:
        plan = (_LEVEL,), (1,)

    def gradient(images: Tensor) -> Tensor:
        return input_gradient(subject.model, images).abs().sum(1, keepdim=True)

    def noise(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(subject.seed)
        return torch.rand((len(images), 1, *images.shape[-2:]), generator=generator).to(images)

    methods: dict[str, Any] = {
        f"{subject.method} (chosen)": partial(chunked, explain, batch_size=subject.batch_size),
        "plain gradient": partial(chunked, gradient, batch_size=subject.batch_size),
        "random": noise,
    }
    found: dict[str, DiffROAR] = {}
    try:
        training = Training(
            _factory(subject.fresh, width, device), epochs=epochs, batch_size=_BATCH, lr=_RATE
        )
        for name, method in methods.items():
            found[name] = diffroar(
                method, training, (x, y, x_test, y_test), fractions=plan[0], seeds=plan[1], group="pixel",
                ties="random",
            )  # fmt: skip
    except InputError as error:
        return Retrained(f"DiffROAR could not be measured: {error}.", {})
    return Retrained(_retrained_sentence(found, subject.method, cut), found)


def _factory(fresh: Callable[[int], nn.Module], width: int, device: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        # Called under the training's own random state, from which the network's seed is drawn.
        model = fresh(int(torch.randint(2**31 - 1, ()))).to(device)
        return _Widened(model) if width == 2 else model

    return make


class _Widened(nn.Module):
    """One output z for two classes read as the logits (0, z), as the audit reads it; two outputs as they are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        z = logits(self.model(x))
        if z.ndim == 2 and z.shape[1] > 1:
            return z
        z = z.reshape(len(z))
        return torch.stack([torch.zeros_like(z), z], 1)


def _retrained_sentence(found: dict[str, DiffROAR], method: str, count: int) -> str:
    ours, chance = next(iter(found.values())), found["random"]
    k = min(ours.fractions)
    gap, noise = 100 * ours.at(k), 100 * chance.at(k)
    low = float(ours.interval()[ours.fractions.index(k)][0])
    verdict = (
        "they mark what can be learned from"
        if low > 0
        else "they do not reliably mark what can be learned from"
    )
    told = (
        f"Retrained on the {percent(k, 0)} of pixels that the maps ({method}) call most important, fresh networks are {gap:+.1f} points better than on "
        f"the {percent(k, 0)} they call least (DiffROAR; random maps {noise:+.1f}, {count} training images): {verdict}."
    )
    return told.replace("+-", "−").replace(" -", " −")


def curves(truth: Truth) -> Picture:
    """The curves of deletion and insertion."""
    found = truth.curves.to_dict()

    def draw(axes: Any) -> None:
        at = found["fractions"]
        for ax, name, colour in zip(axes[0], ("deletion", "insertion"), ("C1", "C0")):
            ax.plot(at, found[name], color=colour, label="in the map's order")
            ax.plot(at, found[f"random_{name}"], color="C7", linestyle="--", label="in random order")
            ax.set(
                title="pixels taken away" if name == "deletion" else "pixels given back",
                xlabel="share of pixels",
                ylim=(0, 1.02),
            )
            ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes[0][0].set_ylabel("probability of the answer")
        axes[0][0].legend(loc="upper right")

    return picture(
        draw,
        panels=(1, 2),
        size=(7.0, 2.9),
        caption="Are the maps true? If they are, the answer fades fast when their brightest pixels are taken away, and comes back fast when they are given back.",
        alt=f"Deletion area {found['deletion_area']:.2f} against {found['random_deletion_area']:.2f} at random; insertion area "
        f"{found['insertion_area']:.2f} against {found['random_insertion_area']:.2f}.",
    )
