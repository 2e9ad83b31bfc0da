"""What messages gave away, as a section of a report: the sentence, the table of leakage against price, and the pictures side by side."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from lineament.load.model_and_data import ModelAndData
from lineament.privacy.leakage import Attacked, Leakage
from lineament.privacy.priors import Prior, train_prior
from lineament.privacy.search import Search
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import SEVERITIES, Finding, Picture, Section
from lineament.report.text import plain

SEARCH = Search(steps=60, restarts=1)


def prior_of(x: Tensor, kind: str, *, steps: int, seed: int, width: int = 64) -> Prior:
    """A prior trained on pictures of any sides [n, channels, height, width]: they are padded for it, and what it makes is cut."""
    made: Any = train_prior(F.pad(x, _margins(x)), kind=kind, steps=steps, seed=seed, width=width)  # pyright: ignore[reportArgumentType]
    render, (height, wide) = made.render, x.shape[2:]
    made.render = lambda value: render(value)[..., :height, :wide]
    return made


def _margins(x: Tensor) -> tuple[int, int, int, int]:
    """Zeros to the right and below that make a square side which 4 divides."""
    side = -(-max(x.shape[2:]) // 4) * 4
    return 0, side - x.shape[3], 0, side - x.shape[2]


def bounds_of(fitted: ModelAndData, channels: int) -> tuple[Tensor, Tensor]:
    """Least and greatest values of normalised pictures: of black and white where the layout says how they are normalised, else of the samples."""
    layout = fitted.layout
    if layout.mean:
        mean, std = (torch.tensor(v).expand(channels).float() for v in (layout.mean, layout.std))
        return -mean / std, (1 - mean) / std
    x = fitted.inputs(torch.arange(len(fitted)))
    return x.amin((0, 2, 3)).cpu(), x.amax((0, 2, 3)).cpu()


def _strongest(found: Leakage) -> list[Attacked]:
    """For each defence the attack whose pictures are nearest."""
    names = dict.fromkeys(a.defence for a in found.attacked)
    return [
        max((a for a in found.attacked if a.defence == name), key=lambda a: float(a.psnr.mean()))
        for name in names
    ]


def section_of(found: Leakage, steps: int, seconds: float) -> Section:
    count = len(found.truth)
    best = max((float(v.mean()), name) for name, v in found.without.items())
    strongest = _strongest(found)
    seen = {a.defence: _seen(a, best[0], _field(found, a.defence)) for a in strongest}
    findings = [_finding(a, best, found, seen, steps) for a in strongest]
    prices = {p.defence: p for p in found.prices}
    rows = [
        [
            a.defence, a.attack, float(a.psnr.mean()), float(a.psnr.std() / count**0.5), a.ssim, f"{int(a.named.sum())} of {a.field}",
            f"{100 * a.labels_right:.0f} % ({a.rule})", prices[a.defence].cosine, prices[a.defence].progress,
        ]
        for a in found.attacked
    ]  # fmt: skip
    rows += [["no message", name, float(v.mean()), float(v.std() / count**0.5), None, None, None, None, None] for name, v in found.without.items()]  # fmt: skip
    table = Table(
        "Leakage against price. Named: guesses that are nearer to their own picture than to the other audited ones. Labels right: of those read off the message, "
        "and by which rule. The price of a defence: the cosine of the update with the plain one, and the share of the plain step's drop in loss that it keeps.",
        ["defence", "attack", "PSNR, dB", "standard error", "SSIM", "named", "labels right", "cosine with the plain update", "progress kept"],
        rows,
    )  # fmt: skip
    return Section(
        f"batch-{found.batch}",
        f"Messages of {found.batch} picture{'s' if found.batch > 1 else ''}",
        status=min(findings, key=lambda f: SEVERITIES.index(f.severity)).severity,
        number=f"{float(strongest[0].psnr.mean()):.1f} dB",
        unit=f"of the rebuilt pictures, {strongest[0].defence} done to the message",
        sentence=findings[0].sentence,
        findings=findings,
        tables=[table],
        pictures=[_pictures(found)],
        seconds=seconds,
        numbers=plain(
            {
                "attacked": [
                    {"defence": a.defence, "attack": a.attack, "psnr": a.psnr.tolist(), "ssim": a.ssim, "named": a.named.tolist(), "scores": a.scores.tolist(), "labels_right": a.labels_right}
                    for a in found.attacked
                ],
                "without": {k: v.tolist() for k, v in found.without.items()},
                "prices": [vars(p) for p in found.prices],
            }
        ),
    )  # fmt: skip


def _field(found: Leakage, defence: str) -> Attacked:
    """The attack that named most pictures of a defence's messages."""
    return max((a for a in found.attacked if a.defence == defence), key=lambda a: int(a.named.sum()))


def _seen(found: Attacked, without: float, naming: Attacked) -> bool:
    """Whether pictures are nearer than without the message by twice the standard error, or more are told apart than chance would (a binomial tail below 1 %)."""
    error = float(found.psnr.std() / len(found.psnr) ** 0.5)
    told_apart = (
        binomtest(int(naming.named.sum()), len(naming.named), 1 / naming.field, "greater").pvalue < 0.01
    )
    return float(found.psnr.mean()) - 2 * error > without or bool(told_apart)


def _finding(
    found: Attacked, without: tuple[float, str], told: Leakage, seen: dict[str, bool], steps: int
) -> Finding:
    mean, error = float(found.psnr.mean()), float(found.psnr.std() / len(found.psnr) ** 0.5)
    naming = _field(told, found.defence)
    how = "undefended" if found.defence == "nothing" else f"defended by {found.defence}"
    text = (
        f"From one update of {told.batch} picture{'s' if told.batch > 1 else ''}, {how}, the strongest attack ({found.attack}) rebuilds pictures at {mean:.1f} dB "
        f"(standard error {error:.1f}, {len(found.psnr)} pictures), where {without[1]} {'has' if 'mean' in without[1] else 'have'} {without[0]:.1f} dB; "
        f"{int(naming.named.sum())} of {len(naming.named)} guesses of {naming.attack} are nearest to their own picture among {naming.field} (by chance 1 in {naming.field})."
    )
    key = f"batch-{told.batch}"
    if seen[found.defence]:
        return Finding(
            "warning",
            text,
            key,
            "Compare defences by the table: what each leaves to see, and what it costs.",
            key="pictures leak",
        )
    text += " No attack tried sees more than what is known without the message."
    if steps < SEARCH.steps:
        return Finding(
            "note", f"{text} The searches were short ({steps} steps, the default is {SEARCH.steps}), so that nothing follows.", key, "Search longer.", key="searched too little"
        )  # fmt: skip
    if found.defence != "nothing" and not seen.get("nothing", True):
        return Finding("note", f"{text} They see nothing undefended either, so that this says nothing of the defence.", key, key="nothing seen")  # fmt: skip
    return Finding("good", text, key, key="nothing seen")


def _pictures(found: Leakage) -> Picture:
    best = _strongest(found)
    rows = [("true", found.truth), *((f"{a.defence}: {a.attack}", a.pictures) for a in best)]
    shown = min(len(found.truth), 8)

    def draw(ax: Any) -> None:
        tiles = torch.cat(
            [
                F.pad(torch.cat(list(F.pad(x[:shown], (1, 1, 1, 1), value=1.0)), 2), (0, 0, 1, 1), value=1.0)
                for _, x in rows
            ],
            1,
        )
        image = tiles.permute(1, 2, 0).cpu().numpy()
        ax.imshow(image[..., 0] if image.shape[2] == 1 else image[..., :3], cmap="gray", vmin=0, vmax=1)
        height = image.shape[0] / len(rows)
        ax.set_yticks([height * (k + 0.5) for k in range(len(rows))], [name for name, _ in rows])
        ax.set_xticks([])
        ax.grid(False)

    told = "; ".join(f"{a.defence}: {float(a.psnr.mean()):.1f} dB" for a in best)
    return picture(
        draw,
        alt=f"The first {shown} true pictures, and below them what the strongest attack rebuilt of each defence's messages. {told}.",
        caption="The true pictures, and what the strongest attack rebuilt from each defence's messages.",
    )
