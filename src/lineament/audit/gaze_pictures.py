"""The pictures of the lens *gaze*: maps over images, and what comes out when a patch or a cue is exchanged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.audit.cue_exchange import Cue, Cues
from lineament.audit.patch_exchange import Exchange, Window, donors, exchanged
from lineament.audit.phrases import percent, spread
from lineament.audit.subject import Subject
from lineament.report.figures import picture
from lineament.report.section import Picture
from lineament.report.text import printable


def overlay(subject: Subject, rows: Tensor, maps: Tensor, hits: Tensor, misses: Tensor) -> Picture:
    lines = [("right", hits), ("wrong", misses)]
    lines = [(word, chosen) for word, chosen in lines if len(chosen)]
    columns = max(len(chosen) for _, chosen in lines)

    def draw(axes: Any) -> None:
        for line, (word, chosen) in enumerate(lines):
            for column in range(columns):
                bare, seen = axes[line, 2 * column], axes[line, 2 * column + 1]
                if column >= len(chosen):
                    bare.set_axis_off()
                    seen.set_axis_off()
                    continue
                at = int(chosen[column])
                row = int(rows[at])
                image = subject.display(row)
                _show(bare, image.numpy())
                true = printable(subject.class_name(int(subject.targets[row])), limit=13)
                said = printable(subject.class_name(int(subject.outputs[row].argmax())), limit=13)
                bare.set_title(f"{true}" if word == "right" else f"{true}, not", fontsize=8)
                seen.set_title("✓" if word == "right" else said, fontsize=8)
                _show(seen, (image if image.ndim == 2 else image.mean(-1)).numpy())
                found = maps[at]
                heat = (found - found.min()) / (found.max() - found.min()).clamp_min(1e-30)
                heat = F.interpolate(
                    heat[None, None], size=image.shape[:2], mode="bilinear", align_corners=False
                )[0, 0]
                seen.imshow(heat.numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=1)

    return picture(
        draw,
        kind="png",
        panels=(len(lines), 2 * columns),
        size=(6.8, 0.4 + 1.4 * len(lines)),
        caption="Each image beside where the network looked for its answer (bright). First row: answers that are right; second row: wrong ones, "
        "with the true class and, above the map, what the network said.",
        alt=f"Saliency maps beside their images for {len(hits)} right and {len(misses)} wrong answers.",
    )


def exchange_picture(subject: Subject, rows: Tensor, v: Exchange) -> Picture:
    """Image, image that lends its patch, and what comes out: the intervention as one sees it."""
    lent = donors(subject, rows)
    right = (subject.outputs[rows].argmax(1) == subject.targets[rows]).nonzero().flatten()
    at = right[spread(len(right), 4)] if len(right) else torch.arange(min(4, len(rows)))
    chosen, givers = rows[at], lent[at]
    if subject.fixed_batch:
        chosen, givers = (
            chosen.repeat(subject.batch_size)[: subject.batch_size],
            givers.repeat(subject.batch_size)[: subject.batch_size],
        )
    partner = dict(zip(chosen.tolist(), givers.tolist()))

    def swapped(x: Tensor, part: Tensor) -> Tensor:
        return exchanged(subject, x, part, partner, v.window)

    answers = subject.answer(chosen, swapped).argmax(1)
    said = subject.outputs.argmax(1)
    count = len(at)

    def draw(axes: Any) -> None:
        for column in range(count):
            row, giver = int(chosen[column]), int(givers[column])
            image, other = subject.display(row).clone(), subject.display(giver)
            mixed = image.clone()
            mixed[v.window.cut()] = other[v.window.cut()]
            names = [subject.class_name(int(k)) for k in (said[row], said[giver], answers[column])]
            says = ("it says", "it says", "now it says")
            for line, (shown, word, name) in enumerate(zip((image, other, mixed), says, names)):
                ax = axes[line, column]
                _show(ax, shown.numpy())
                ax.set_title(f"{word} {printable(name, limit=14)}", fontsize=8, loc="center")
                _outline(ax, v.window, 1.6)

    return picture(
        draw,
        kind="png",
        panels=(3, count),
        size=(1.5 * count + 0.4, 5.4),
        caption="The test: each image (top) gets only the framed patch of another image (middle); what the network says of all three.",
        alt=f"{count} images that each get one patch of another image; the answer changes to that image's "
        f"in {percent(v.followed, 0)} of all {v.samples} images tried.",
    )


def frame(subject: Subject, rows: Tensor, mean_map: Tensor | None, v: Exchange) -> Picture:
    mean = torch.stack([subject.display(int(r)) for r in rows[:100]]).mean(0)

    def draw(axes: Any) -> None:
        panels = list(axes[0])
        _show(panels[0], mean.numpy())
        panels[0].set_title("the mean image")
        height, width = mean.shape[:2]
        if mean_map is not None:
            panels[1].imshow(mean_map.numpy(), cmap="inferno", vmin=0)
            panels[1].set_title("where it looks, on average")
            _bare(panels[1])
        image = panels[-1].imshow(
            v.map,
            cmap="inferno",
            vmin=0,
            vmax=max(0.2, v.followed),
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )
        panels[-1].set_title("answers that follow a patch")
        _bare(panels[-1])
        bar = panels[-1].figure.colorbar(image, ax=panels[-1], shrink=0.75)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        for ax in panels:
            _outline(ax, v.window, 1.8)

    return picture(
        draw,
        kind="png",
        panels=(1, 2 if mean_map is None else 3),
        size=(7.4, 2.5),
        caption="Looking and intervening: the frame marks the patch that decides most. "
        "On the right, how many answers follow each patch when it is taken from another image.",
        alt=f"Mean image, mean saliency map and map of the intervention; the framed patch at {v.window.where(*mean.shape[:2])} "
        f"decides {percent(v.followed, 0)} of answers, patches elsewhere {percent(v.others_followed, 0)}.",
    )


def cue_picture(subject: Subject, cues: Cues, cue: Cue) -> Picture:
    """Some images, those that give the cue, and what comes out."""
    at, images = cues.examples(subject, cue, 4)
    pairs, said = cues.pairs, subject.outputs.argmax(1)
    answers = cues.answers(subject, cue, at)
    count = len(at)

    def draw(axes: Any) -> None:
        for column, (position, trio) in enumerate(zip(at.tolist(), images)):
            row, giver = int(pairs.receivers[position]), int(pairs.givers[position])
            names = [subject.class_name(int(k)) for k in (said[row], said[giver], answers[column])]
            for line, (shown, word, name) in enumerate(
                zip(trio, ("it says", "it says", "now it says"), names)
            ):
                _show(axes[line, column], shown.numpy())
                axes[line, column].set_title(f"{word} {printable(name, limit=14)}", fontsize=8)

    return picture(
        draw,
        kind="png",
        panels=(3, count),
        size=(1.5 * count + 0.4, 5.4),
        caption=f"Each image (top) gets only the {cue.name} of another image (middle); what the network says of all three.",
        alt=f"{count} images that each get the {cue.name} of another; {percent(cue.followed[0], 0)} of {cue.samples} answers follow.",
    )


def _show(ax: Any, image: Any) -> None:
    ax.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
    _bare(ax)


def _bare(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _outline(ax: Any, window: Window, width: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (window.left - 0.5, window.top - 0.5)
    ax.add_patch(Rectangle(corner, window.width, window.height, fill=False, edgecolor="C1", linewidth=width))
