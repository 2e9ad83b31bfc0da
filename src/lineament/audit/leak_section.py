"""What messages gave away, as a section of a report: the sentence, the table of leakage against price, and the pictures side by side."""

from __future__ import annotations

from textwrap import fill
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
# A defended message shows nothing where guesses lead by less than so many dB, two standard errors included, over so many pictures.
_LEAD, _PICTURES = 1.0, 4


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


def section_of(found: Leakage, steps: int, seconds: float, *, update: bool = False) -> Section:
    """The section of messages of one size; ``update``: of a saved one, which may be of other pictures than those given."""
    best = max((float(v.mean()), name) for name, v in found.without.items())
    strongest = _strongest(found)
    seen = {a.defence: _seen(a, best[0], _field(found, a.defence)) for a in strongest}
    findings = [_finding(a, best, found, seen, steps) for a in strongest]
    if update:
        findings = [*_foreign(found), *findings]
    if found.buffers:
        findings.append(_buffers(found))
    prices = {p.defence: p for p in found.prices}
    rows = [
        [
            a.defence, a.attack, float(a.psnr.mean()), _error(a.psnr), prices[a.defence].cosine, prices[a.defence].progress, f"{int(a.named.sum())} of {a.field}",
            a.ssim, f"{100 * a.labels_right:.0f} % ({a.rule})",
        ]
        for a in found.attacked
    ]  # fmt: skip
    rows += [["no message", name, float(v.mean()), _error(v), None, None, None, None, None] for name, v in found.without.items()]  # fmt: skip
    table = Table(
        "Leakage against price. Named: guesses that are nearer to their own picture than to the other audited ones. Labels right: of those read off the message, "
        "and by which rule. The price of a defence: the cosine of the update with the plain one, and the share of the plain step's drop in loss that it keeps.",
        ["defence", "attack", "PSNR, dB", "standard error", "cosine", "progress kept", "named", "SSIM", "labels right"],
        rows,
    )  # fmt: skip
    shown = Table(
        "Whom the guesses show, beside the control: the same search on another batch's message. Registered: after the guess was moved to fit. First: guesses that are nearest to "
        "their picture among all audited and public ones, by features of the public pictures (principal components, and discriminants where they have groups); person: whose "
        "nearest other picture is of the same group; in brackets the mean of 1 / rank.",
        ["defence", "attack", "PSNR, dB", "from another message, dB", "registered, dB", "CW-SSIM", "error of the logits", "first", "person first", "person by chance", "person from another message"],
        [_whom(a) for a in found.attacked],
    )  # fmt: skip
    return Section(
        f"batch-{found.batch}",
        f"Messages of {found.batch} picture{'s' if found.batch > 1 else ''}",
        status=min(findings, key=lambda f: SEVERITIES.index(f.severity)).severity,
        number=f"{float(strongest[0].psnr.mean()):.1f} dB",
        unit=f"of the rebuilt pictures, {strongest[0].defence} done to the message",
        sentence=findings[0].sentence,
        findings=findings,
        tables=[table, shown],
        pictures=[_pictures(found)],
        seconds=seconds,
        numbers=plain(
            {
                "attacked": [
                    {"defence": a.defence, "attack": a.attack, "psnr": a.psnr.tolist(), "ssim": a.ssim, "named": a.named.tolist(), "scores": a.scores.tolist(), "labels_right": a.labels_right, **_told(a)}
                    for a in found.attacked
                ],
                "without": {k: v.tolist() for k, v in found.without.items()},
                "local": found.local,
                "buffers": found.buffers,
                "prices": [vars(p) for p in found.prices],
            }
        ),
    )  # fmt: skip


def _field(found: Leakage, defence: str) -> Attacked:
    """The attack that named most pictures of a defence's messages."""
    return max((a for a in found.attacked if a.defence == defence), key=lambda a: int(a.named.sum()))


def _error(values: Tensor) -> float | None:
    """The standard error of a mean, None of one value."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def _whom(a: Attacked) -> list[Any]:
    who = a.identified
    rank = lambda first, mean: f"{100 * first:.0f} % ({mean:.2f})"  # noqa: E731
    first = None if who is None else f"{rank(who.rank1, who.reciprocal_rank)} of {who.field:,}"
    person = chance = control = None
    if who is not None and who.person is not None:
        person = f"{rank(who.person_rank1, who.person_reciprocal_rank)} of {who.gallery:,}"
        chance = f"{100 * who.chance:.1f} %"
        control = None if who.control is None else f"{100 * float((who.control == 1).double().mean()):.0f} %"
    wrong, moved = (None if v is None else float(v.mean()) for v in (a.wrong, a.registered))
    return [a.defence, a.attack, float(a.psnr.mean()), wrong, moved, a.cw_ssim, a.answers, first, person, chance, control]  # fmt: skip


def _told(a: Attacked) -> dict[str, Any]:
    """Further numbers of an attack for the file."""
    lists = {"wrong": a.wrong, "registered": a.registered}
    found: dict[str, Any] = {k: None if v is None else v.tolist() for k, v in lists.items()}
    who = a.identified
    ranks = {} if who is None else {"picture_ranks": who.picture.tolist(), "person_ranks": None if who.person is None else who.person.tolist()}  # fmt: skip
    return {**found, "cw_ssim": a.cw_ssim, "answers": a.answers, "wrong_named": a.wrong_named, **ranks}


def _seen(found: Attacked, without: float, naming: Attacked) -> bool:
    """Whether pictures are nearer than without the message by twice the standard error, or more are told apart than chance, and than by another message (a binomial
    tail below 1 %)."""
    chance = max(1 / naming.field, naming.wrong_named)
    named, count = int(naming.named.sum()), len(naming.named)
    if (
        count == 1 and naming.identified is not None
    ):  # one picture is its own neighbour; among the public ones it need not be
        named, chance = int(naming.identified.picture[0] == 1), 1 / naming.identified.field
    told_apart = chance < 1 and binomtest(named, count, chance, "greater").pvalue < 0.01
    spread = _error(found.psnr)
    return (spread is not None and float(found.psnr.mean()) - 2 * spread > without) or bool(told_apart)


def _buffers(found: Leakage) -> Finding:
    many = found.buffers > 1
    return Finding(
        "warning",
        f"The buffers of {found.buffers} batch norm{'s' if many else ''} go with the update, and the mean and variance of every channel over the batch follow from them by arithmetic; "
        "clipping and noise on the weights leave them as they are.",
        f"batch-{found.batch}",
        "Keep batch norms' buffers on the client, or use group norm.",
        key="buffers leak",
    )  # fmt: skip


def _foreign(found: Leakage) -> list[Finding]:
    """Whether a saved update can be of the pictures that were given, by its cosine with the one that they make."""
    cosine = found.prices[0].cosine
    if cosine > 0.5 or found.prices[0].defence != "nothing":
        return []
    return [
        Finding(
            "warning",
            f"The saved update has a cosine of {cosine:.2f} with the one that these pictures make by the local training assumed: it is of other pictures, other weights, or other steps, "
            "and what follows does not say what it gives away.",
            f"batch-{found.batch}",
            "Give the pictures behind the update, the weights before it (--before), and the client's steps (--local).",
            key="update of others",
        )
    ]


def _finding(
    found: Attacked, without: tuple[float, str], told: Leakage, seen: dict[str, bool], steps: int
) -> Finding:
    mean, error = float(found.psnr.mean()), _error(found.psnr)
    spread = "one picture" if error is None else f"standard error {error:.1f}, {len(found.psnr)} pictures"
    control = (
        ""
        if found.wrong is None
        else f", and guesses from another message {float(found.wrong.mean()):.1f} dB"
    )
    naming = _field(told, found.defence)
    how = "undefended" if found.defence == "nothing" else f"defended by {found.defence}"
    ranks = f"{int(naming.named.sum())} of {len(naming.named)} guesses of {naming.attack} are nearest to their own picture among {naming.field} (by chance 1 in {naming.field})."
    who = naming.identified
    if naming.field == 1 and who is not None:  # one picture is its own neighbour
        ranks = f"the picture is number {int(who.picture[0])} of {who.field:,} audited and public ones by nearness to the guess of {naming.attack}."
    text = (
        f"From one update of {told.batch} picture{'s' if told.batch > 1 else ''}, {how}, the strongest attack ({found.attack}) rebuilds pictures at {mean:.1f} dB "
        f"({spread}), where {without[1]} {'has' if 'mean' in without[1] else 'have'} {without[0]:.1f} dB{control}; {ranks}"
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
    if steps < SEARCH.steps:
        return Finding(
            "note", f"{text} No attack tried was seen to find more than what is known without the message, but the searches were short ({steps} step{'s' if steps > 1 else ''}, the default is {SEARCH.steps}), so that nothing follows.",
            key, "Search longer.", key="searched too little",
        )  # fmt: skip
    lead = found.psnr - told.without[without[1]]
    wide = None if len(lead) < _PICTURES else 2 * float(_error(lead) or 0.0)
    if wide is None or float(lead.mean()) + wide >= _LEAD:
        far = f"{float(lead.mean()):+.1f} dB".replace("-", "−")
        why = f"over {len(lead)} picture{'s' if len(lead) > 1 else ''}, where {_PICTURES} are needed" if wide is None else f"± {wide:.1f} dB (two standard errors), which does not stay below {_LEAD:g} dB"  # fmt: skip
        return Finding("note", f"{text} Whether that is more than what is known without the message is not resolved: the difference is {far} {why}.", key, "Audit more pictures.", key="not resolved")  # fmt: skip
    text += f" No attack tried sees more than what is known without the message: the difference, two standard errors included, is below {_LEAD:g} dB."
    if found.defence == "nothing":
        return Finding("note", f"{text} Of an undefended message a stronger attack may see more, so that nothing follows.", key, "Search longer, or with a prior.", key="nothing seen")  # fmt: skip
    if "nothing" not in seen:
        return Finding("note", f"{text} No undefended message was searched beside it, so that this says nothing of the defence.", key, "Add the defence none.", key="nothing seen")  # fmt: skip
    if not seen["nothing"]:
        return Finding("note", f"{text} They see nothing undefended either, so that this says nothing of the defence.", key, key="nothing seen")  # fmt: skip
    return Finding("good", text, key, key="nothing seen")


def _pictures(found: Leakage) -> Picture:
    best = _strongest(found)
    rows = [("true", found.truth), *((fill(f"{a.defence}: {a.attack}", 13), a.pictures) for a in best)]
    without = max((float(v.mean()), name) for name, v in found.without.items())
    if found.guess is not None:
        rows.append((fill(f"no message: {without[1]}", 13), found.guess))
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

    told = "; ".join(
        [
            *(f"{a.defence}: {float(a.psnr.mean()):.1f} dB" for a in best),
            f"without a message: {without[0]:.1f} dB",
        ]
    )
    return picture(
        draw,
        alt=f"The first {shown} true pictures, below them what the strongest attack rebuilt of each defence's messages, and the best guess without a message. {told}.",
        caption="The true pictures, what the strongest attack rebuilt from each defence's messages, and the best guess without a message.",
    )
