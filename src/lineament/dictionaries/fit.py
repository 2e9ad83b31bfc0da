"""Does a dictionary fit this model, and if not, what is likely wrong: the layer, the special tokens, the scale, the activation function, the mean?

Each suspicion is one change that should not help if all is right. It is named only where it at least halves the unexplained variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.checks import InputError, number, require
from lineament.core.codes import Codes
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.families import hook_of_site, site_of_hook
from lineament.core.sites.hooks import replace
from lineament.core.sites.naming import resolve
from lineament.dictionaries.saving import weights_hash
from lineament.dictionaries.sequences import Sequences
from lineament.dictionaries.splice import features_back, features_last, site_in, splice

_HALF = 0.5  # an alternative is named where it leaves at most this share of the unexplained variance
_SCALES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.4, 2.0, 3.0, 5.0, 10.0, 20.0)
_KEPT = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Fit(Readable):
    """What :func:`fit_of` measured on ``tokens`` activations.

    Attributes:
        fvu: the share of the variance that the reconstruction leaves; 1 is no better than the mean. l0: how many features are on.
        kl: mean KL(clean || on the reconstruction) in nats. kl_ablated: the same with every activation at the mean.
        chance_fvu: of the same activations with their coordinates permuted, of which the dictionary can know nothing.
        kl_permuted: the KL on the reconstructions of other tokens, dealt out at random.
        likely: what is likely wrong, one sentence each; none where nothing was found.
        fits: whether it explains more than chance and more than half of the variance.

    >>> Fit(100, fvu=0.2, l0=8.0, kl=0.1, kl_ablated=0.9, kl_permuted=1.2, chance_fvu=0.8, likely=()).fits
    True
    """

    tokens: int
    fvu: float
    l0: float
    kl: float
    kl_ablated: float
    kl_permuted: float
    chance_fvu: float
    likely: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.fvu < 0.5 and self.fvu < self.chance_fvu and self.kl < self.kl_ablated and not self.likely

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "fits": self.fits, "likely": list(self.likely)}


@torch.no_grad()
def fit_of(
    dictionary: Any,
    model: nn.Module,
    data: Any,
    *,
    tokens: int = 4096,
    exclude: Any = "special",
    seed: int = 0,
) -> Fit:
    """How well a dictionary fits a model, against chance, and what is likely wrong where it does not.

    Args:
        dictionary: loaded or trained, with its site. data: of the model; the first sequences with about ``tokens`` positions are read.
        exclude: tokens that give no activations, as of :func:`lineament.dictionaries.harvest`.

    Raises:
        InputError: an unknown site, or a site of another width than the dictionary's, which is another model or site.

    >>> from lineament.dictionaries import Neurons
    >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    >>> found = fit_of(Neurons(3, site="0"), net, torch.randn(50, 3))
    >>> found.fvu, found.likely
    (0.0, ())
    """
    number("tokens", tokens, low=2, integer=True)
    site, sequences = site_in(model, dictionary), Sequences(model, data, exclude=exclude)
    d = dictionary.atoms.shape[1]
    batches, xs, marks, count = [], [], [], 0
    with frozen(model):
        for batch in sequences.walk(8):
            with capture(model, site.name, stop_early=True) as acts:
                batch.call(model)
            x = features_last(acts[site.name], site)
            if x.shape[-1] != d:
                raise InputError(
                    f"dictionary: of activations with {d} numbers, but {x.shape[-1]} pass at {site.name!r}; it is of another model or another site"
                )
            mask = batch.mask if batch.mask is not None and batch.mask.shape == x.shape[:-1] else None
            batches.append(batch)
            xs.append(x.reshape(-1, d))
            marks.append(
                torch.ones(len(xs[-1]), dtype=torch.bool) if mask is None else mask.reshape(-1).cpu()
            )
            count += int(marks[-1].sum())
            if count >= tokens:
                break
        require(count > 1, "data: it gives fewer than two activations that count, expected many")
        every, kept = torch.cat(xs), torch.cat(marks)
        x = every[kept.to(every.device)]
        generator = torch.Generator().manual_seed(seed)
        codes = dictionary.codes(x)
        fvu, l0 = _fvu(x, dictionary.decode(codes)), float(codes.count().double().mean())
        shuffled = x[:, torch.randperm(d, generator=generator).to(x.device)]
        chance = _fvu(shuffled, dictionary.decode(dictionary.codes(shuffled)))
        kls = _kls(model, dictionary, site, batches, x.mean(0), generator)
        suspicions = [
            *_recorded(dictionary, model),
            *_other_layers(model, dictionary, site, batches, marks, fvu),
            *_special(dictionary, every, kept, fvu),
            *_scaled(dictionary, x, fvu),
            *_too_many(dictionary, x, codes, fvu, l0),
            *_mean(dictionary, x, fvu),
        ]
    return Fit(len(x), fvu, l0, *kls, chance, tuple(suspicions))


def _fvu(x: Tensor, back: Tensor) -> float:
    spread = (x.double() - x.double().mean(0)).square().sum()
    require(
        float(spread) > 0,
        "data: all activations at the site are alike, so that there is no variance to explain",
    )
    return float((x.double() - back.double()).square().sum() / spread)


def _kls(
    model: nn.Module, dictionary: Any, site: Any, batches: Sequence[Any], mean: Tensor, generator: Any
) -> tuple[float, float, float]:
    sums, count = torch.zeros(3, dtype=torch.float64), 0

    def dealt(value: Tensor) -> Tensor:
        x = features_last(value, site)
        rows = dictionary.decode(dictionary.codes(x.reshape(-1, x.shape[-1])))
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        return features_back(rows.reshape(x.shape).to(x.dtype), value, site)

    def averaged(value: Tensor) -> Tensor:
        x = features_last(value, site)
        return features_back(mean.to(x).expand_as(x).contiguous(), value, site)

    for batch in batches:
        clean = batch.logits(batch.call(model)).double().log_softmax(-1)
        on = (
            batch.mask.reshape(-1)
            if batch.mask is not None and batch.mask.shape == clean.shape[:-1]
            else None
        )
        runs = []
        with splice(model, {site.name: dictionary}):
            runs.append(batch.logits(batch.call(model)))
        for function in (averaged, dealt):
            with replace(model, {site: function}):
                runs.append(batch.logits(batch.call(model)))
        for k, logits in enumerate(runs):
            kl = (clean.exp() * (clean - logits.double().log_softmax(-1))).sum(-1).reshape(-1)
            sums[k] += float((kl if on is None else kl[on]).sum())
        count += len(clean.reshape(-1, clean.shape[-1])) if on is None else int(on.sum())
    found = (sums / max(1, count)).tolist()
    return found[0], found[1], found[2]


def _recorded(dictionary: Any, model: nn.Module) -> list[str]:
    """What the dictionary itself says of the model that it was made for."""
    info = getattr(dictionary, "info", {})
    sha = (info.get("training") or {}).get("model_sha256")
    if sha is not None and sha != weights_hash(model):
        return ["model: its weights are not those that the dictionary was trained on (their SHA-256 differs)"]
    known = str(info.get("model") or "")
    here = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    plain = [name.rstrip("/").rpartition("/")[2].lower().removesuffix("-small") for name in (known, here)]
    if known and here and plain[0] != plain[1]:
        return [f"model: it was made for {known!r}, and this is {here!r}"]
    return []


def _other_layers(
    model: nn.Module, dictionary: Any, site: Any, batches: Sequence[Any], marks: Sequence[Tensor], fvu: float
) -> list[str]:
    """The same kind of site in other blocks, and the other side of its own."""
    places = []
    hook = hook_of_site(site.name, model)
    if hook is not None and hook.startswith("blocks."):
        _, layer, kind = hook.split(".", 2)
        kinds = [kind] + [
            k for k in ("hook_resid_pre", "hook_resid_post") if kind.startswith("hook_resid") and k != kind
        ]
        for k in kinds:
            for number_ in range(200):
                try:
                    name = site_of_hook(f"blocks.{number_}.{k}", model)
                    resolve(model, name)
                except InputError:
                    break
                if (k, str(number_)) != (kind, layer):
                    places.append(name)
    if not places:
        return []
    found = {}
    batch, on = batches[0], marks[0]
    with capture(model, places, stop_early=False) as acts:
        batch.call(model)
    for name in places:
        x = features_last(acts[name], site)
        if x.shape[-1] == dictionary.atoms.shape[1]:
            rows = x.reshape(-1, x.shape[-1])[on.to(x.device)]
            found[name] = _fvu(rows, dictionary.decode(dictionary.codes(rows)))
    best = min(found, key=lambda name: found[name], default=None)
    if best is not None and found[best] < _HALF * fvu:
        return [f"layer: at {best!r} it leaves {found[best]:.3g} of the variance, at {site.name!r} {fvu:.3g}"]
    return []


def _special(dictionary: Any, every: Tensor, kept: Tensor, fvu: float) -> list[str]:
    """Tokens of an outlying norm among those that count (a BOS without its id, say)."""
    x = every[kept.to(every.device)]
    norms = x.norm(dim=1)
    usual = norms <= 5 * norms.median()
    if bool(usual.all()) or int(usual.sum()) < 2:
        return []
    rest = x[usual]
    without = _fvu(rest, dictionary.decode(dictionary.codes(rest)))
    if without < _HALF * fvu:
        return [
            f"special tokens: without the {int((~usual).sum())} of {len(x)} activations of more than five times the median norm (BOS?) it leaves "
            f"{without:.3g} of the variance, with them {fvu:.3g}; name them by exclude="
        ]
    return []


def _scaled(dictionary: Any, x: Tensor, fvu: float) -> list[str]:
    found = {s: _fvu(x, dictionary.decode(dictionary.codes(x * s)) / s) for s in _SCALES}
    best = min(found, key=lambda s: found[s])
    if found[best] < _HALF * fvu:
        return [
            f"scale: of activations times {best:g} it leaves {found[best]:.3g} of the variance, as they are {fvu:.3g}; load it with scale="
        ]
    return []


def _too_many(dictionary: Any, x: Tensor, codes: Codes, fvu: float, l0: float) -> list[str]:
    """Whether the strongest few features alone do better: TopK weights read as ReLU."""
    values = codes.values.abs()
    found: dict[int, float] = {}
    for k in _KEPT:
        if k < l0 / 2:
            places = values.topk(k, -1).indices
            few = Codes(codes.indices.gather(-1, places), codes.values.gather(-1, places), codes.width)
            found[k] = _fvu(x, dictionary.decode(few))
    best = min(found, key=lambda k: found[k], default=None)
    if best is not None and found[best] < _HALF * fvu:
        return [
            f"activation: {l0:.0f} features are on; the {best} largest alone leave {found[best]:.3g} of the variance, all of them {fvu:.3g} (TopK weights read as "
            "another kind?)"
        ]
    return []


def _mean(dictionary: Any, x: Tensor, fvu: float) -> list[str]:
    centre = x.mean(-1, keepdim=True)
    rest = x - centre
    if float(rest.norm()) == 0:
        return []
    centred = _fvu(x, dictionary.decode(dictionary.codes(rest)) + centre)
    normed = F.layer_norm(x, x.shape[-1:])
    by = x.std(-1, keepdim=True, unbiased=False)
    layer = _fvu(x, dictionary.decode(dictionary.codes(normed)) * by + centre)
    found = []
    if centred < _HALF * fvu:
        found.append(
            f"mean: with the mean of each token's numbers removed it leaves {centred:.3g} of the variance, as they are {fvu:.3g} (center_writing_weights); load it with centred=True"
        )
    if layer < _HALF * min(fvu, centred):
        found.append(
            f"normalisation: of layer-normalised activations it leaves {layer:.3g} of the variance, as they are {fvu:.3g}"
        )
    return found
