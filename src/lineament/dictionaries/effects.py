"""What features do to the model's output: added to the activation, beside random directions of the same norm; or taken out where they are on.

The protocol of Olmo et al. 2024 (arXiv 2411.10397): in random contexts, add ``strength`` typical norms of the site along a feature's direction, the same for
every feature, and compare the output's distribution with the clean one. Forwards begin at the site, many features side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.batching import auto_batch, progress
from lineament.core.checks import number, one_of, require
from lineament.core.checks import seed as checked_seed
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.core.sites.hooks import replace
from lineament.core.sites.naming import Site
from lineament.core.sites.resuming import FromSite
from lineament.dictionaries.sequences import Batch, Sequences
from lineament.dictionaries.splice import features_back, features_last, site_in

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class SteeringEffects(Readable):
    """What :func:`steering_effects` measured, per latent.

    Attributes:
        latents: which. contexts: how many contexts.
        kl: mean KL(clean || steered) in nats. logit_change: mean of \\|difference\\| over the outputs.
        entropy: of the distribution of \\|difference\\| over the outputs, in nats: low where few outputs are moved.
        kl_active, kl_silent: the mean KL over contexts where the feature is on and where it is not; NaN where there are none.
        random_kl, random_logit_change, random_entropy: the same of random directions of equal norm, one for each latent.
        above: the share of latents whose KL is above 95 % of the random directions'.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    >>> found = steering_effects(net, Neurons(2, site="0"), torch.ones(5, 2), typical_norm=1.0)
    >>> found.contexts, found.latents.tolist()
    (5, [0, 1])
    """

    latents: Tensor
    contexts: int
    strength: float
    typical_norm: float
    kl: Tensor
    logit_change: Tensor
    entropy: Tensor
    kl_active: Tensor
    kl_silent: Tensor
    random_kl: Tensor
    random_logit_change: Tensor
    random_entropy: Tensor
    above: float

    def to_dict(self) -> dict[str, Any]:
        return {
            key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(self).items()
        }


@torch.no_grad()
def steering_effects(
    model: nn.Module,
    dictionary: Any,
    contexts: Any,
    *,
    latents: Sequence[int] | int = 64,
    strength: float = 1.0,
    positions: str = "last",
    typical_norm: float | None = None,
    seed: int = 0,
) -> SteeringEffects:
    """How far each feature, added to an activation, moves the output, beside random directions of equal norm.

    Args:
        contexts: token ids (contexts, positions) or other data of the model; their last position's output is compared.
        latents: which, or how many drawn at random.
        strength: how many typical norms are added.
        positions: ``"last"``, the last position alone, or ``"all"``.
        typical_norm: the site's; by default the mean norm over these contexts (at the steered positions).

    Raises:
        InputError: an unknown site or latent, contexts of unequal length.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    >>> steering_effects(net, Neurons(2, site="0"), torch.randn(5, 2), latents=[0, 1]).kl.shape
    torch.Size([2])
    """
    one_of("positions", positions, ("last", "all"))
    number("strength", strength)
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    atoms = dictionary.atoms
    chosen = _chosen(latents, len(atoms), generator)
    norms = atoms[chosen].norm(dim=1)
    require(
        bool((norms > 0).all()),
        f"latents: {chosen[norms == 0][:5].tolist()} have a decoder of norm 0, which has no direction",
    )
    own = atoms[chosen] / norms[:, None]
    random = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own)
    random = random / random.norm(dim=1, keepdim=True)
    directions = torch.cat([own, random])
    site = site_in(model, dictionary)
    sequences = Sequences(model, contexts, exclude=None)
    sums = torch.zeros(3, len(directions), dtype=torch.float64)
    by_state = torch.zeros(2, 2, len(chosen), dtype=torch.float64)  # (active, silent) x (sum, count)
    seen = 0
    with frozen(model):
        starts = list(_starts(model, site, sequences))
        if typical_norm is None:
            rows = [_at(features_last(start.value, site), positions).float() for start, _ in starts]
            typical_norm = float(torch.cat([row.norm(dim=-1).flatten() for row in rows]).mean())
        number("typical_norm", typical_norm, low=0, open_low=True)
        for start, batch in progress(starts, "steering"):
            x = features_last(start.value, site)
            before = _last_output(batch.logits(start.output)).double().log_softmax(-1)
            change = strength * typical_norm * directions.to(x)
            own_codes = dictionary.codes(_at(x, "last"))

            def some(
                first: int,
                last: int,
                start: Any = start,
                batch: Any = batch,
                x: Tensor = x,
                change: Tensor = change,
            ) -> Tensor:
                steered = _added(x, change[first:last], positions)
                return _last_output(_resumed(model, site, start, batch, steered, last - first))

            raw = _last_output(batch.logits(start.output)).double()
            most = max(1, TOKENS_AT_ONCE // max(1, x.shape[:-1].numel()))
            done = 0
            for logits in auto_batch(some, len(directions), most=most, memory=(steering_effects, x.shape)):
                logits = logits.double().unflatten(0, (-1, len(batch)))
                kl = (before.exp() * (before - logits.log_softmax(-1))).sum(-1)  # (directions, contexts)
                moved = (logits - raw).abs()
                share = moved / moved.sum(-1, keepdim=True).clamp_min(1e-300)
                entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
                part = slice(done, done + len(kl))
                sums[:, part] += torch.stack([kl.sum(1), moved.mean(-1).sum(1), entropy.sum(1)]).cpu()
                for k in range(part.start, min(part.stop, len(chosen))):
                    on = (own_codes.column(int(chosen[k])) != 0).flatten()
                    values = kl[k - done].cpu()
                    for state, mask in enumerate((on.cpu(), ~on.cpu())):
                        by_state[state, 0, k] += values[mask].sum()
                        by_state[state, 1, k] += mask.sum()
                done += len(kl)
            seen += len(batch)
    means = (sums / max(1, seen)).float()
    n = len(chosen)
    split = (by_state[:, 0] / by_state[:, 1]).float()  # 0 / 0 is NaN: no such context
    limit = means[0, n:].quantile(0.95)
    return SteeringEffects(
        latents=chosen, contexts=seen, strength=strength, typical_norm=typical_norm,
        kl=means[0, :n], logit_change=means[1, :n], entropy=means[2, :n], kl_active=split[0], kl_silent=split[1],
        random_kl=means[0, n:], random_logit_change=means[1, n:], random_entropy=means[2, n:],
        above=float((means[0, :n] > limit).double().mean()),
    )  # fmt: skip


@torch.no_grad()
def ablation_effects(
    model: nn.Module, dictionary: Any, data: Any, places: dict[int, list[int]], *, exclude: Any = "special"
) -> dict[int, float]:
    """The mean KL(clean || without) of turning a feature off where it is on, over the tokens of some sequences at which it is on: {feature: nats}.

    Args:
        places: for each feature the sequences to look at; features that are off in all of them are left out.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.eye(2))
    >>> found = ablation_effects(net, Neurons(2, site="0"), torch.tensor([[0.0, 2.0]]), {0: [0], 1: [0]})
    >>> {feature: round(value, 3) for feature, value in found.items()}
    {1: 0.328}
    """
    site, sequences = site_in(model, dictionary), Sequences(model, data, exclude=exclude)
    require(sequences.indexed, "data: it has no index; expected data whose sequences can be taken by number")
    found: dict[int, float] = {}
    atoms = dictionary.atoms
    by_sequence: dict[int, list[int]] = {}
    for feature, many in places.items():
        for sequence in many:
            by_sequence.setdefault(sequence, []).append(feature)
    sums: dict[int, list[float]] = {}
    with frozen(model):
        for sequence, features in progress(list(by_sequence.items()), "turning features off"):
            batch = sequences.take(torch.tensor([sequence]))
            start = _start(model, site, batch)
            x = features_last(start.value, site)
            codes = dictionary.codes(x)
            clean = batch.logits(start.output).double().log_softmax(-1)
            values = torch.stack([codes.column(feature) for feature in features])
            most = max(1, TOKENS_AT_ONCE // max(1, x.shape[:-1].numel()))
            for first in range(0, len(features), most):
                part, value = features[first : first + most], values[first : first + most]
                rows = x - (
                    value[..., None] * atoms[part].reshape(len(part), *[1] * (x.ndim - 1), -1)
                ).flatten(0, 1).to(x)
                logits = _resumed(model, site, start, batch, rows.reshape(len(part), *x.shape[1:]), len(part))
                kl = (clean.exp() * (clean - logits.double().log_softmax(-1))).sum(-1)
                for feature, own, on in zip(part, kl, value.flatten(0, 1) != 0):
                    counted = (
                        own[on] if own.shape == on.shape else own.reshape(-1)[: 1 if bool(on.any()) else 0]
                    )
                    total = sums.setdefault(feature, [0.0, 0.0])
                    total[0] += float(counted.sum())
                    total[1] += counted.numel()
    for feature, (total, count) in sums.items():
        if count:
            found[feature] = total / count
    return found


def _chosen(latents: Sequence[int] | int, width: int, generator: torch.Generator) -> Tensor:
    if isinstance(latents, int):
        number("latents", latents, low=1, integer=True)
        return torch.randperm(width, generator=generator)[:latents].sort().values
    found = torch.as_tensor(list(latents), dtype=torch.long)
    require(len(found) > 0, "latents: got none, expected at least one")
    bad = found[(found < 0) | (found >= width)]
    require(not len(bad), f"latents: got {bad[:5].tolist()}, expected numbers from 0 to {width - 1}")
    return found


def _start(model: nn.Module, site: Site, batch: Batch) -> FromSite:
    if isinstance(batch.inputs, dict):
        named = {**batch.inputs, "use_cache": False} if hasattr(model, "generate") else batch.inputs
        return FromSite(model, site, named, lambda inputs: model(**inputs))
    if hasattr(model, "generate"):
        return FromSite(model, site, batch.inputs, lambda inputs: model(inputs, use_cache=False))
    return FromSite(model, site, batch.inputs, model)


def _starts(model: nn.Module, site: Site, sequences: Sequences) -> Any:
    size = 16
    for batch in sequences.walk(size):
        there = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
        require(
            there is None or bool(there.all()),
            "contexts: some are padded, so that their last position is none of theirs; expected contexts of one length",
        )
        yield _start(model, site, batch), batch


def _resumed(model: nn.Module, site: Site, start: FromSite, batch: Batch, x: Tensor, times: int) -> Tensor:
    """The logits with other activations at the site, ``times`` as many rows as the batch has."""
    like = start.value.repeat(times, *[1] * (start.value.ndim - 1))
    value = features_back(x, like, site)

    def repeated(inputs: Any) -> Any:
        return (
            {k: repeated(v) for k, v in inputs.items()}
            if isinstance(inputs, dict)
            else inputs.repeat(times, *[1] * (inputs.ndim - 1))
        )

    inputs = repeated(batch.inputs)
    cached: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    with start.replayed(times), replace(model, {site: lambda _: value}):
        output = model(**inputs, **cached) if isinstance(inputs, dict) else model(inputs, **cached)
    return batch.logits(output)


def _added(x: Tensor, change: Tensor, positions: str) -> Tensor:
    """(directions x contexts, ..., d): every context with each direction added."""
    out = x.repeat(len(change), *[1] * (x.ndim - 1))
    rows = change.repeat_interleave(len(x), 0)
    if x.ndim == 2:
        return out + rows
    if positions == "last" and x.ndim == 3:
        out[:, -1] += rows
        return out
    return out + rows.reshape(len(rows), *[1] * (x.ndim - 2), -1)


def _at(x: Tensor, positions: str) -> Tensor:
    if positions == "last" and x.ndim == 3:
        return x[:, -1]
    return x if positions == "all" or x.ndim == 2 else x.flatten(1, -2).mean(1)


def _last_output(logits: Tensor) -> Tensor:
    """(rows, outputs): of a sequence those of its last position."""
    return logits[:, -1] if logits.ndim == 3 else logits
