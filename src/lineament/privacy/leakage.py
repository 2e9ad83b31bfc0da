"""What does one message give away? The search's pictures beside the true ones, and beside what could be had without any message.

A bare PSNR says nothing: on aligned faces the mean of other people's pictures already has 16 dB. So each number stands beside the mean public picture, the nearest
of as many samples of the prior as there were restarts, and the same search on another batch's message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.batching import progress
from lineament.core.checks import number, require, show
from lineament.core.models import logits
from lineament.core.results import Readable
from lineament.privacy.defences import Defence
from lineament.privacy.labels import guessed_targets
from lineament.privacy.local import Local
from lineament.privacy.messages import Message, fixed
from lineament.privacy.picture_scores import picture_scores
from lineament.privacy.priors import Prior
from lineament.privacy.reconstruction import Reconstruction, reconstruct
from lineament.privacy.search import Search

SEARCH = Search()


@dataclass(frozen=True)
class Attacked(Readable):
    """One attack on messages under one defence.

    ``psnr``: of each picture, in decibels, of pictures in [0, 1]; ``ssim``: its mean; ``scores``: matching costs of each message; ``named``: of each
    picture, whether it is nearer to its guess than every other picture (rank 1), in a field of ``field`` pictures, ``reciprocal_rank`` its mean.
    ``rule``: how labels were read off, ``labels_right``: the share that was right. ``pictures``: the guesses in [0, 1], in the order of the true ones.
    ``wrong``: the control, PSNR of each picture against the guess from another batch's message; None where there is one message.
    """

    defence: str
    attack: str
    psnr: Tensor
    ssim: float
    scores: Tensor
    stage: Tensor
    stage_psnr: Tensor
    named: Tensor
    reciprocal_rank: float
    field: int
    rule: str
    labels_right: float
    pictures: Tensor
    steps: int
    wrong: Tensor | None = None


@dataclass(frozen=True)
class Price(Readable):
    """What a defence costs the one who uses it: the cosine of its message with the undefended one, and the fall of the held-out loss after a step
    along the mean message, as a share of the fall after an undefended step of the same length (1 where nothing is lost)."""

    defence: str
    cosine: float
    progress: float


@dataclass(frozen=True)
class Leakage(Readable):
    """What messages gave away: ``truth`` in [0, 1], one entry of ``attacked`` for each defence and attack, ``without`` a message (PSNR of each picture by how
    it was guessed), and the defences' ``prices``. ``local``: what was done between the weights that were received and those sent; ``buffers``: how many batch norms'
    statistics were sent beside the weights, from which the batch's own follow."""

    truth: Tensor
    batch: int
    attacked: tuple[Attacked, ...]
    without: dict[str, Tensor]
    prices: tuple[Price, ...]
    local: str = ""
    buffers: int = 0


def leakage(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    public: Tensor,
    prior: Prior | None,
    defences: Sequence[Defence] = (Defence(),),
    attacks: Sequence[str] = ("gifd", "latent", "ig"),
    batch: int = 1,
    local: Local | None = None,
    search: Search = SEARCH,
    known_labels: bool = False,
    held_out: tuple[Tensor, Tensor] | None = None,
    bounds: tuple[Tensor, Tensor],
    seed: int = 0,
) -> Leakage:
    """Make messages of one's own pictures, search each, and score what was found.

    Args:
        images, targets: the pictures that are audited, normalised as the model takes them; their number is a multiple of ``batch``.
        public: other pictures of the kind, normalised; none of those audited. prior: see :func:`lineament.privacy.train_prior`; None searches pixels only.
        held_out: pictures and labels on which the defences' price is measured; by default those audited.
        known_labels: give the attacker the labels; else they are read off the messages.
        bounds: least and greatest values of normalised pictures by channel.

    Raises:
        InputError: pictures that do not make whole batches, audited pictures among the public ones, a model that cannot be searched.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)); x = torch.rand(6, 1, 4, 4)
    >>> found = leakage(net, x[:2], torch.tensor([0, 1]), public=x[2:], prior=None, attacks=["ig"], search=Search(steps=2, restarts=1),
    ...     bounds=(torch.zeros(1), torch.ones(1)))
    >>> found.attacked[0].psnr.shape, sorted(found.without)
    (torch.Size([2]), ['the mean of public pictures'])
    """
    number("batch", batch, low=1, integer=True)
    require(
        images.ndim == 4 and len(images) > 0 and len(images) % batch == 0,
        f"images: got {show(images)}, expected [n, channels, height, width] with n a multiple of batch = {batch}",
    )
    require(
        public.ndim == 4 and public.shape[1:] == images.shape[1:] and len(public) > 0,
        f"public: got {show(public)}, expected pictures shaped as the audited ones {tuple(images.shape[1:])}",
    )
    flat = public.flatten(1)
    shared = [k for k, x in enumerate(images.flatten(1)) if bool((flat == x).all(1).any())]
    require(
        not shared,
        f"public: it contains the audited pictures {shared[:5]}; a prior that knows them proves nothing",
    )
    truth = _shown(images, bounds)
    groups = list(zip(images.split(batch), targets.split(batch)))
    attacked, prices, buffers = [], [], 0
    for defence in defences:
        messages = [
            Message.of(model, x, y, defence=defence, local=local, seed=seed + k)
            for k, (x, y) in enumerate(groups)
        ]
        prices.append(_price(model, groups, messages, held_out, local, seed))
        buffers = max(buffers, len(messages[0].statistics))
        read = [guessed_targets(model, m, images[:1], public) for m in messages]
        labels = targets.view(-1, batch) if known_labels else torch.stack([y for y, _ in read])
        rule = "given" if known_labels else ", ".join(dict.fromkeys(name for _, name in read))
        right = (labels.sort(1).values == targets.view(-1, batch).sort(1).values).float().mean()
        for attack in progress(list(attacks), f"searching messages: {defence}"):
            for (
                name,
                copy,
            ) in defence.copies().items():  # the attacker's ways to repeat it; the audit reports the worst
                told = [replace(message, defence=copy) for message in messages]
                found = reconstruct(
                    model, told, labels, images.shape[1:], prior=prior, attack=attack, search=search, bounds=bounds, seed=seed
                )  # fmt: skip
                named = f"{attack}, {name}" if name else attack
                attacked.append(_scored(found, truth, batch, bounds, str(defence), named, rule, float(right)))
    return Leakage(
        truth,
        batch,
        tuple(attacked),
        _without(truth, public, prior, search, targets, bounds, seed),
        tuple(prices),
        "" if local is None else str(local),
        buffers,
    )


def _of_another(shown: Tensor, true: Tensor) -> Tensor | None:
    """PSNR of each picture against the guess from another message [messages, batch, ...]: what the same search gives where it cannot know the picture."""
    if len(shown) < 2:
        return None
    guesses = shown.roll(1, 0)
    return torch.cat([psnr(guess[_order(guess, own)], own) for guess, own in zip(guesses, true)])


def psnr(guesses: Tensor, truth: Tensor) -> Tensor:
    """Decibels of each picture, of pictures in [0, 1].

    >>> round(psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).item(), 3)
    20.0
    """
    error = (guesses - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-12))


def _shown(images: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    low, high = (b.to(images).view(1, -1, 1, 1) for b in bounds)
    return ((images - low) / (high - low)).clamp(0, 1)


def _scored(
    found: Reconstruction,
    truth: Tensor,
    batch: int,
    bounds: tuple[Tensor, Tensor],
    defence: str,
    attack: str,
    rule: str,
    right: float,
) -> Attacked:
    shown = _shown(found.pictures.flatten(0, 1), bounds).view(-1, batch, *truth.shape[1:])
    true = truth.view(-1, batch, *truth.shape[1:])
    ordered = torch.stack([guess[_order(guess, own)] for guess, own in zip(shown, true)]).flatten(0, 1)
    stages = torch.stack(
        [
            torch.stack(
                [psnr(one[_order(one, own)], own).mean() for one in (_shown(s, bounds) for s in each)]
            )
            for each, own in zip(found.stage_pictures, true)
        ]
    )
    far = torch.cdist(ordered.flatten(1), truth.flatten(1))
    rank = (far < far.diagonal()[:, None]).sum(1) + 1
    scores = picture_scores(ordered, truth)
    return Attacked(
        defence, attack, psnr(ordered, truth), scores.ssim, found.scores, found.stage, stages, rank == 1,
        float((1 / rank).mean()), len(truth), rule, right, ordered, found.steps, _of_another(shown, true),
    )  # fmt: skip


def _order(guess: Tensor, truth: Tensor) -> Tensor:
    """Which guess is whose: the assignment of least total squared error."""
    cost = torch.cdist(truth.flatten(1), guess.flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=guess.device)


def _without(
    truth: Tensor,
    public: Tensor,
    prior: Prior | None,
    search: Search,
    targets: Tensor,
    bounds: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    mean = _shown(public.mean(0, keepdim=True), bounds).expand_as(truth)
    found = {"the mean of public pictures": psnr(mean, truth)}
    if prior is not None:
        generator = torch.Generator(truth.device).manual_seed(seed + 1)
        code = torch.randn(
            search.restarts, prior.code, generator=generator, dtype=truth.dtype, device=truth.device
        )
        with torch.no_grad():
            made = code
            for block in prior.blocks(code, targets[:1].expand(len(code))):
                made = block(made)
        samples = _shown(prior.render(made), bounds)
        each = torch.stack([psnr(s.expand_as(truth), truth) for s in samples])
        found[f"the nearest of {search.restarts} samples of the prior"] = each.amax(0)
    return found


def _price(
    model: nn.Module,
    groups: Sequence[tuple[Tensor, Tensor]],
    messages: Sequence[Message],
    held_out: tuple[Tensor, Tensor] | None,
    local: Local | None,
    seed: int,
) -> Price:
    plain = [Message.of(model, x, y, local=local, seed=seed) for x, y in groups]
    cosines = [
        F.cosine_similarity(torch.cat([t.flatten() for t in a.tensors]), torch.cat([t.flatten() for t in b.tensors]), dim=0)
        for a, b in zip(plain, messages)
    ]  # fmt: skip
    steps = [
        [torch.stack(each).mean(0) for each in zip(*(m.tensors for m in some))] for some in (plain, messages)
    ]
    x, y = held_out or (torch.cat([x for x, _ in groups]), torch.cat([y for _, y in groups]))
    changes = [_change(model, step, x, y) for step in steps]
    return Price(
        str(messages[0].defence),
        float(torch.stack(cosines).mean()),
        changes[1] / changes[0] if changes[0] else float("nan"),
    )


@torch.no_grad()
def _change(model: nn.Module, step: Sequence[Tensor], x: Tensor, y: Tensor, length: float = 0.01) -> float:
    """The change of the loss after a short step against a message, of a length relative to the weights' norm."""
    still, own = fixed(model)
    size = torch.stack([w.square().sum() for w in own.values()]).sum().sqrt()
    norm = torch.stack([t.square().sum() for t in step]).sum().sqrt().clamp(min=1e-30)
    moved = {n: w - length * size / norm * t for (n, w), t in zip(own.items(), step)}
    before, after = (
        F.cross_entropy(logits(torch.func.functional_call(still, w, (x,))), y) for w in (own, moved)
    )
    return float(after - before)
