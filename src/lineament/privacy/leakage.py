"""What does one message give away? The search's pictures beside the true ones, and beside what could be had without any message.

A bare PSNR says nothing: on aligned faces the mean of other people's pictures already has 16 dB. So each number stands beside the mean public picture, the nearest
of as many samples of the prior as there were restarts, and the same search on another batch's message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lineament.core.batching import progress
from lineament.core.checks import number, require, show
from lineament.core.models import logits
from lineament.core.results import Readable
from lineament.privacy.defences import Defence
from lineament.privacy.identification import Identified, Judge, fisher_features, identified
from lineament.privacy.labels import guessed_targets
from lineament.privacy.local import Local
from lineament.privacy.messages import Message, fixed
from lineament.privacy.picture_scores import picture_scores
from lineament.privacy.priors import Prior
from lineament.privacy.reconstruction import Reconstruction, reconstruct
from lineament.privacy.robust_scores import cw_ssim, registered_psnr
from lineament.privacy.search import Search


@dataclass(frozen=True)
class LeakageOptions:
    """How messages are made, attacked and judged.

    Attributes:
        defences: what clients may switch on. attacks: names of :data:`~lineament.privacy.search.ATTACKS`. search: of each attack.
        batch: pictures of a message. local: training by the client, by default one gradient.
        known_labels: give the attacker the labels; else they are read off the messages.
        copies: try every way in which an attacker may repeat a defence, not only the first.
        judge: how guesses are ordered, and among whom they are looked for.

    >>> LeakageOptions(attacks=["ig"]).batch
    1
    """

    defences: Sequence[Defence] = (Defence(),)
    attacks: Sequence[str] = ("gifd", "latent", "ig")
    search: Search = field(default_factory=Search)
    batch: int = 1
    local: Local | None = None
    known_labels: bool = False
    copies: bool = True
    judge: Judge = field(default_factory=Judge)


OPTIONS = LeakageOptions()


@dataclass(frozen=True)
class Attacked(Readable):
    """One attack on messages under one defence.

    ``psnr``: of each picture, in decibels, of pictures in [0, 1]; ``ssim``: its mean; ``scores``: matching costs of each message; ``named``: of each
    picture, whether it is nearer to its guess than every other picture (rank 1), in a field of ``field`` pictures, ``reciprocal_rank`` its mean.
    ``rule``: how labels were read off, ``labels_right``: the share that was right. ``pictures``: the guesses in [0, 1], in the order of the true ones.
    ``wrong``: the control, PSNR of each picture against the guess from another batch's message, of which the share ``wrong_named``
    is nearest to its picture. ``registered``: PSNR after the guess was moved to fit;
    ``cw_ssim``: complex wavelet SSIM; ``answers``: mean squared difference of the model's logits. ``identified``: ranks among other pictures.
    ``stage_psnr`` [messages, layers]: PSNR of each layer's pictures, and ``depth_psnr`` of those that are returned where the search ends at that layer.
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
    wrong_named: float = 0.0
    registered: Tensor | None = None
    cw_ssim: float = float("nan")
    answers: float = float("nan")
    identified: Identified | None = None
    depth_psnr: Tensor | None = None


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
    it was guessed; ``guess``: the pictures of the best way), and the defences' ``prices``. ``local``: what was done between the weights that were received and those sent; ``buffers``: how many batch norms'
    statistics were sent beside the weights, from which the batch's own follow."""

    truth: Tensor
    batch: int
    attacked: tuple[Attacked, ...]
    without: dict[str, Tensor]
    prices: tuple[Price, ...]
    local: str = ""
    buffers: int = 0
    guess: Tensor | None = None


def leakage(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    public: Tensor,
    prior: Prior | None,
    options: LeakageOptions = OPTIONS,
    sent: Sequence[Message] | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    bounds: tuple[Tensor, Tensor],
    seed: int = 0,
) -> Leakage:
    """Make messages of one's own pictures, search each, and score what was found.

    Args:
        images, targets: the pictures that are audited, normalised as the model takes them; their number is a multiple of ``options.batch``.
        public: other pictures of the kind, normalised; none of those audited. prior: see :func:`lineament.privacy.train_prior`; None searches pixels only.
        held_out: pictures and labels on which the defences' price is measured, by default those audited; other clients of secure aggregation have theirs of them.
        options: how messages are made, attacked and judged.
        sent: the messages themselves, one for each batch, as they were read from files; ``options.defences`` and ``options.local`` are then theirs.
        bounds: least and greatest values of normalised pictures by channel.

    Raises:
        InputError: pictures that do not make whole batches, audited pictures among the public ones, a model that cannot be searched.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)); x = torch.rand(6, 1, 4, 4)
    >>> found = leakage(net, x[:2], torch.tensor([0, 1]), public=x[2:], prior=None,
    ...     options=LeakageOptions(attacks=["ig"], search=Search(steps=2, restarts=1)), bounds=(torch.zeros(1), torch.ones(1)))
    >>> found.attacked[0].psnr.shape, sorted(found.without)
    (torch.Size([2]), ['the mean of public pictures'])
    """
    batch, local, search, judge = options.batch, options.local, options.search, options.judge
    number("batch", batch, low=1, integer=True)
    require(
        images.ndim == 4 and len(images) > 0 and len(images) % batch == 0,
        f"images: got {show(images)}, expected [n, channels, height, width] with n a multiple of batch = {batch}",
    )
    require(
        public.ndim == 4 and public.shape[1:] == images.shape[1:] and len(public) > 0,
        f"public: got {show(public)}, expected pictures shaped as the audited ones {tuple(images.shape[1:])}",
    )
    none_shared(images, public)
    if judge.encoder is None:  # once for all attacks
        judge = replace(judge, encoder=fisher_features(public, judge.public_groups))
    require(
        sent is None or [m.count for m in sent] == [batch] * (len(images) // batch),
        f"sent: got messages of {[m.count for m in sent or ()][:5]} pictures, expected one of {batch} for each batch",
    )
    truth = _shown(images, bounds)
    audited = _Audited(model, images, truth, targets, public, batch, bounds, judge)
    groups = list(zip(images.split(batch), targets.split(batch)))
    further = _control_batch(held_out, images, batch) if len(groups) == 1 else None
    attacked, prices, buffers = [], [], 0
    for defence in options.defences if sent is None else [sent[0].defence]:
        messages = sent or [
            Message.of(model, x, y, defence=defence, local=local, others=held_out, seed=seed + k)
            for k, (x, y) in enumerate(groups)
        ]
        prices.append(_price(model, groups, messages, held_out, messages[0].local, seed))
        buffers = max(buffers, len(messages[0].statistics))
        all_messages = list(messages)
        if further is not None:
            all_messages.append(
                Message.of(
                    model, *further, defence=defence, local=messages[0].local, others=held_out, seed=seed + 1
                )
            )
        if options.known_labels or set(options.attacks) == {"dlg"}:  # which searches labels itself
            labels = torch.stack([y for _, y in groups] + ([] if further is None else [further[1]]))
            rule = "given"
        else:
            read = [guessed_targets(model, m, images[:1], public) for m in all_messages]
            labels = torch.stack([y for y, _ in read])
            rule = ", ".join(dict.fromkeys(name for _, name in read))
        # The attacker's ways to repeat the defence, of which the audit reports the worst.
        ways = list(defence.copies().items())[: None if options.copies else 1]
        for attack in progress(list(options.attacks), f"searching messages: {defence}"):
            for name, copy in ways:
                told = [replace(message, defence=copy) for message in all_messages]
                found = reconstruct(
                    model, told, labels, images.shape[1:], prior=prior, attack=attack, search=search, bounds=bounds, seed=seed
                )  # fmt: skip
                named = f"{attack}, {name}" if name else attack
                how = "searched with the picture" if attack == "dlg" else rule
                attacked.append(audited.scored(found, str(defence), named, how))
    without, guess = _without(truth, public, prior, search, targets, bounds, seed)
    return Leakage(
        truth,
        batch,
        tuple(attacked),
        without,
        tuple(prices),
        str(local or (sent[0].local if sent else None) or ""),
        buffers,
        guess,
    )


def none_shared(images: Tensor, public: Tensor) -> None:
    """Refuse audited pictures among the public ones."""
    shared = same_as_any(images, public).nonzero()[:, 0].tolist()
    require(
        not shared,
        f"public: it contains the audited pictures {shared[:5]}; a prior that knows them proves nothing",
    )


def same_as_any(images: Tensor, others: Tensor) -> Tensor:
    """Which pictures are, pixel by pixel, one of the others [n].

    >>> same_as_any(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0]])).tolist()
    [False, True]
    """
    if len(others) > len(images):
        flat = others.flatten(1)
        return torch.stack([(flat == x).all(1).any() for x in images.flatten(1)])
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for other in others.flatten(1):
        found |= (images.flatten(1) == other).all(1)
    return found


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


@dataclass(frozen=True)
class _Audited:
    """What the guesses of every attack are judged by."""

    model: nn.Module
    images: Tensor
    truth: Tensor
    targets: Tensor
    public: Tensor
    batch: int
    bounds: tuple[Tensor, Tensor]
    judge: Judge

    def ranks(self, guesses: Tensor) -> Tensor:
        """Of each guess, how near its own picture is among the audited ones, by pixels; 1 the nearest."""
        far = torch.cdist(guesses.flatten(1), self.truth.flatten(1))
        return (far < far.diagonal()[:, None]).sum(1) + 1

    def scored(self, found: Reconstruction, defence: str, attack: str, rule: str) -> Attacked:
        messages, shape = len(self.truth) // self.batch, self.truth.shape[1:]
        pictures = found.pictures.view(-1, self.batch, *shape)
        shown = _shown(pictures.flatten(0, 1), self.bounds).view_as(pictures)
        true = self.truth.view(messages, self.batch, *shape)
        labels = self.targets.view(messages, self.batch)
        right = float(
            (found.targets[:messages].sort(1).values == labels.to(found.targets).sort(1).values)
            .double()
            .mean()
        )

        def of(guesses: Tensor, which: Tensor, k: int) -> Tensor:
            """Which guess is whose in one batch."""
            if self.judge.order == "labels":
                return which.argsort(stable=True)[labels[k].argsort(stable=True).argsort()]
            return _order(guesses, true[k])

        orders = [of(shown[k], found.targets[k], k) for k in range(messages)]
        ordered = torch.stack([shown[k][order] for k, order in enumerate(orders)]).flatten(0, 1)
        own = torch.stack([pictures[k][order] for k, order in enumerate(orders)]).flatten(0, 1)
        stages = []
        for k in range(messages):
            each = [_shown(stage, self.bounds) for stage in found.stage_pictures[k]]
            stages.append(torch.stack([psnr(x[of(x, found.targets[k], k)], true[k]).mean() for x in each]))
        by_stage = torch.stack(stages)
        chosen = _best_so_far(found.stage_scores[:messages]).to(by_stage.device)
        control, wrong, wrong_named = None, None, 0.0
        if len(pictures) > 1:  # one further message may stand at the end for this
            rows = [(k + 1) % len(pictures) for k in range(messages)]
            orders = [of(shown[j], found.targets[j], k) for k, j in enumerate(rows)]
            control = torch.cat([pictures[j][order] for j, order in zip(rows, orders)])
            others = torch.cat([shown[j][order] for j, order in zip(rows, orders)])
            wrong, wrong_named = psnr(others, self.truth), float((self.ranks(others) == 1).double().mean())
        rank = self.ranks(ordered)
        still, parameters = fixed(self.model)
        with torch.no_grad():
            answers, true_answers = (
                logits(functional_call(still, parameters, (x,))) for x in (own, self.images)
            )
        side = min(shape[1:])
        return Attacked(
            defence, attack, psnr(ordered, self.truth), picture_scores(ordered, self.truth).ssim, found.scores[:messages], found.stage[:messages],
            by_stage, rank == 1, float((1 / rank).mean()), len(self.truth), rule, right, ordered, found.steps, wrong, wrong_named,
            registered_psnr(ordered, self.truth), float(cw_ssim(ordered, self.truth, levels=2 if side >= 8 else 1).mean()) if side >= 4 else float("nan"),
            float((answers - true_answers).square().mean()), identified(own, self.images, self.public, self.judge, control=control),
            by_stage.gather(1, chosen),
        )  # fmt: skip


def _best_so_far(scores: Tensor) -> Tensor:
    """For each layer the place of the smallest score up to it, [messages, layers]."""
    told = scores.nan_to_num(nan=torch.inf)
    return torch.stack([told[:, : k + 1].argmin(1) for k in range(told.shape[1])], 1)


def _order(guess: Tensor, truth: Tensor) -> Tensor:
    """Which guess is whose: the assignment of least total squared error."""
    cost = torch.cdist(truth.flatten(1), guess.flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=guess.device)


def _control_batch(
    held_out: tuple[Tensor, Tensor] | None, images: Tensor, batch: int
) -> tuple[Tensor, Tensor] | None:
    """Another batch, whose message says nothing of a single audited one."""
    if held_out is None or len(held_out[0]) < batch or held_out[0].shape[1:] != images.shape[1:]:
        return None
    return held_out[0][:batch], held_out[1][:batch]


def _without(
    truth: Tensor,
    public: Tensor,
    prior: Prior | None,
    search: Search,
    targets: Tensor,
    bounds: tuple[Tensor, Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """PSNR of each picture by how it was guessed, and the pictures of the best way."""
    guess = _shown(public.mean(0, keepdim=True), bounds).expand_as(truth)
    found = {"the mean of public pictures": psnr(guess, truth)}
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
        name = (
            f"the nearest of {search.restarts} samples of the prior"
            if search.restarts > 1
            else "a sample of the prior"
        )
        best = each.max(0)
        if float(best.values.mean()) > float(found["the mean of public pictures"].mean()):
            guess = samples[best.indices]
        found[name] = best.values
    return found, guess.clone()


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
    before, after = (F.cross_entropy(logits(functional_call(still, w, (x,))), y) for w in (own, moved))
    return float(after - before)
