"""Was a class forgotten, or only muted? Forget accuracy alone is met by a head that never answers it.

Beside accuracies: a linear probe of the class at each layer, how soon the class is learned again, what its samples are called now, and whether their loss
still tells which of them were trained on. *Erased* is said only beside a network that was trained without the class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core import checks
from lineament.core.checks import number, require, show
from lineament.core.models import called, device_of, dtype_of, frozen, logits
from lineament.core.readouts.logistic_readout import logistic
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import default_sites

_NEAR = 0.05  # of probe accuracy
_BATCH = 256


@dataclass(frozen=True)
class Knowledge(Readable):
    """What one network knows of a class.

    Attributes:
        forget, retain: accuracy on the class and on the others.
        probe: {site: accuracy of a linear read-out of the class against as many others; 0.5 is chance}.
        samples, steps: of the class and of training until it is answered again, ``None`` where it was not within the steps allowed.
        called: the share of the class's samples that are called each class, [classes].
        membership: how often a trained sample of the class has a lower loss than an unseen one; 0.5 says nothing; ``None`` without such samples.
    """

    forget: float
    retain: float
    probe: dict[str, float]
    samples: int | None
    steps: int | None
    called: Tensor
    membership: float | None


@dataclass(frozen=True, repr=False)
class Forgotten(Readable):
    """What networks know of a class, before and after an edit, and of one trained without it.

    ``verdict``: ``"kept"`` (more than a tenth of it is still answered), ``"muted"``, or ``"erased"``: read out and learned again no more easily than in
    the network that was trained without it. Without that network it is never said.
    """

    before: Knowledge
    after: Knowledge
    retrained: Knowledge | None
    verdict: str

    @property
    def sentence(self) -> str:
        """The finding in words."""
        now, was = self.after, self.before
        probe = max(now.probe.values())
        back = (
            "training on it again did not bring it back within the steps allowed"
            if now.samples is None
            else f"training again on {now.samples} samples of it brought it back (relearning)"
            if now.samples
            else "it is answered without being learned again"
        )
        verdict = {
            "kept": "The class was kept.",
            "muted": "The class is muted; that it is erased was not shown.",
            "erased": "The class is erased, as far as a network trained without it can tell.",
        }
        start = f"The class is answered in {100 * now.forget:.1f} % of its samples (before {100 * was.forget:.1f} %), the others in {100 * now.retain:.1f} % ({100 * was.retain:.1f} %)"
        return f"{start}; a linear probe of its features tells the class in {100 * probe:.1f} %, and {back}. {verdict[self.verdict]}"


def forgotten(
    before: nn.Module,
    after: nn.Module,
    forget: tuple[Tensor, Tensor],
    retain: tuple[Tensor, Tensor],
    *,
    retrained: nn.Module | None = None,
    unseen: tuple[Tensor, Tensor] | None = None,
    sites: str | Iterable[str] | None = None,
    target: float = 0.9,
    steps: int = 100,
    seed: int = 0,
) -> Forgotten:
    """How much an edited network still knows of a class.

    Args:
        before, after: the network and the edited one; both stay as they were.
        forget, retain: (inputs, labels) of the class and of the others. Half of each fits probes and teaches again, the other half measures.
        retrained: a network trained without the class: the reference.
        unseen: (inputs, labels) of the class that were not trained on; ``forget`` are then those that were.
        sites: places of the probes; by default up to four blocks in the order of depth, and what the head takes.
        target: the class counts as learned again at this accuracy.
        steps: of relearning at most, each with 16 samples of the class and 16 others (SGD, rate 0.01, momentum 0.9).

    Raises:
        InputError: several classes in ``forget``, too few samples.

    >>> x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = forgotten(net, net, (x[:40], torch.zeros(40).long()), (x[40:], torch.ones(40).long()), steps=2)
    >>> found.before.forget == found.after.forget, found.retrained
    (True, None)
    """
    for name, (x, y) in (("forget", forget), ("retain", retain)):
        require(
            len(x) == len(y) and len(x) >= 8,
            f"{name}: got {show(x)} and {show(y)}, expected at least 8 inputs and as many labels",
        )
    labels = torch.as_tensor(forget[1]).unique()
    require(len(labels) == 1, f"forget: got labels {labels.tolist()[:6]}, expected samples of one class")
    label = int(labels)
    require(
        not bool((torch.as_tensor(retain[1]) == label).any()),
        f"retain: it holds samples of class {label}, which is to be forgotten",
    )
    number("target", target, low=0, high=1, open_low=True)
    number("steps", steps, low=1, integer=True)
    checks.seed("seed", seed)
    if sites is None:
        head = [name for name, module in before.named_modules() if isinstance(module, nn.Linear)][-1:]
        blocks = default_sites(before, forget[0][:2].to(device_of(before)), most=4)
        sites = [*blocks, *(f"{name}:in" for name in head)]
    names = [sites] if isinstance(sites, str) else list(sites)

    def knowledge(model: nn.Module) -> Knowledge:
        return _knowledge(model, forget, retain, unseen, names, label, target, steps, seed)

    was, now = knowledge(before), knowledge(after)
    reference = None if retrained is None else knowledge(retrained)
    return Forgotten(was, now, reference, _verdict(now, reference))


def _verdict(now: Knowledge, reference: Knowledge | None) -> str:
    if now.forget > 0.1:
        return "kept"
    if reference is None:
        return "muted"
    read = max(now.probe.values()) <= max(reference.probe.values()) + _NEAR
    slow = now.samples is None or (reference.samples is not None and now.samples >= reference.samples / 2)
    return "erased" if read and slow else "muted"


def _knowledge(
    model: nn.Module,
    forget: tuple[Tensor, Tensor],
    retain: tuple[Tensor, Tensor],
    unseen: tuple[Tensor, Tensor] | None,
    sites: list[str],
    label: int,
    target: float,
    steps: int,
    seed: int,
) -> Knowledge:
    scores, features = _answers(model, forget[0], sites)
    others, other_features = _answers(model, retain[0], [])
    count = min(len(forget[0]), len(retain[0]))
    order = torch.randperm(len(retain[0]), generator=torch.Generator().manual_seed(seed))[:count]
    _, other_features = _answers(model, retain[0][order], sites)
    told = scores.argmax(1)
    probe = {
        site: _probe(features[site][:count], other_features[site], seed) if len(sites) else 0.5
        for site in features
    }
    member = None
    if unseen is not None:
        fresh = F.cross_entropy(_answers(model, unseen[0], [])[0], unseen[1].cpu(), reduction="none")
        known = F.cross_entropy(scores, forget[1].cpu(), reduction="none")
        gap = fresh[None] - known[:, None]
        member = float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())
    samples, needed = _relearned(model, forget, retain, target, steps, seed)
    return Knowledge(
        float((told == label).double().mean()),
        float((others.argmax(1) == retain[1].cpu()).double().mean()),
        probe,
        samples,
        needed,
        torch.bincount(told, minlength=scores.shape[1]).double() / len(told),
        member,
    )


def _answers(model: nn.Module, x: Tensor, sites: list[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Logits, and what passes at each site as one vector a sample."""
    scores: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for some in x.split(_BATCH):
        with frozen(model), torch.no_grad(), capture(model, sites) if sites else nullcontext({}) as acts:
            scores.append(logits(called(model, some.to(device_of(model)))).float().cpu())
        for site in sites:
            z = acts[site].detach().double().cpu()
            parts[site].append(z.mean(tuple(range(2, z.ndim))) if z.ndim > 3 else z.flatten(1))
    return torch.cat(scores), {site: torch.cat(each) for site, each in parts.items()}


def _probe(one: Tensor, other: Tensor, seed: int) -> float:
    """Accuracy of a linear read-out of one set of features against another, on the half that it did not see."""
    x = torch.cat([one, other])
    y = torch.cat([torch.ones(len(one)), torch.zeros(len(other))]).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / x[:half].std(0).clamp_min(1e-6)
    if len(y[:half].unique()) < 2:
        return 0.5
    fit = logistic(x[:half], y[:half], 1.0, classes=2)
    return float((fit.predict(x[half:]).flatten() == y[half:]).double().mean())


def _relearned(
    model: nn.Module,
    forget: tuple[Tensor, Tensor],
    retain: tuple[Tensor, Tensor],
    target: float,
    steps: int,
    seed: int,
) -> tuple[int | None, int | None]:
    """Samples of the class and steps until a copy answers it on the half that it is not taught with."""
    new = copy.deepcopy(model).eval()
    device, dtype = device_of(new), dtype_of(new)
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(x), generator=generator).chunk(2) for x, _ in (forget, retain)]
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], 0.01, momentum=0.9)

    def answered() -> bool:
        scores, _ = _answers(new, forget[0][halves[0][1]], [])
        return float((scores.argmax(1) == forget[1][halves[0][1]].cpu()).double().mean()) >= target

    if answered():
        return 0, 0
    for step in range(1, steps + 1):
        batch: list[tuple[Tensor, Tensor]] = []
        for (x, y), (rows, _) in zip((forget, retain), halves):
            drawn = rows[torch.randint(len(rows), (16,), generator=generator)]
            batch.append((x[drawn], y[drawn]))
        x = torch.cat([b[0] for b in batch]).to(device)
        y = torch.cat([b[1] for b in batch]).to(device)
        optimizer.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(
                logits(called(new, x.to(dtype) if x.is_floating_point() else x)).float(), y
            ).backward()
        optimizer.step()
        if answered():
            return 16 * step, step
    return None, None
