"""What turns each feature on: its strongest examples, a fair sample of all its values, its histogram and density, of every feature in one pass.

What is kept a feature does not grow with the data. Examples are places in the data, (sequence, position); :func:`windows` reads the tokens around them,
with the feature's value at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.core.checks import InputError, number, require
from lineament.core.checks import seed as checked_seed
from lineament.core.codes import Codes
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.naming import Site
from lineament.dictionaries.sequences import Batch, Gradient, Sequences, checked_gradient, objective
from lineament.dictionaries.splice import features_last, site_in

TOKENS_AT_ONCE = 4096
_STRIDE = 2**32  # positions a sequence can have, in the number of a place
BINS = 40
# The histogram's bins, in halves of powers of two of the site's typical norm; what is smaller or larger is in the outer ones.
_LOWEST = -14.0


@dataclass(frozen=True)
class Examples(Readable):
    """What :func:`max_examples` found, for ``width`` features.

    Attributes:
        rows: how many activations were looked at. sequences: in how many sequences.
        typical_norm: the mean norm of an activation. maxima: (width), each feature's largest value. density: (width), the share of activations it is on in.
        means: (width), its mean value where it is on. importance: (width), the mean of \\|f w·g\\| over all activations, or none.
        top, top_places: (width, top), its largest values, one a sequence, and where; 0 and -1 where there are fewer.
        sample, sample_places: the same for values drawn at random from all that are not 0.
        histogram: (width, bins), counts of values. edges: (bins + 1).

    >>> from lineament.dictionaries import Neurons
    >>> found = max_examples(nn.Sequential(nn.Identity()), Neurons(1, site="0"), torch.tensor([[1.0], [4.0]]))
    >>> found.places(0)  # (sequence, position, value)
    [(1, 0, 4.0), (0, 0, 1.0)]
    """

    width: int
    rows: int
    sequences: int
    typical_norm: float
    maxima: Tensor
    density: Tensor
    means: Tensor
    top: Tensor
    top_places: Tensor
    sample: Tensor
    sample_places: Tensor
    histogram: Tensor
    edges: Tensor
    importance: Tensor | None = None

    def places(self, feature: int, which: str = "top") -> list[tuple[int, int, float]]:
        """(sequence, position, value) of a feature's examples, the largest first."""
        values, places = (self.top, self.top_places) if which == "top" else (self.sample, self.sample_places)
        rows = [
            (p // _STRIDE, p % _STRIDE, v)
            for p, v in zip(places[feature].tolist(), values[feature].tolist())
            if p >= 0
        ]
        return sorted(rows, key=lambda row: -row[2])

    def quantiles(self, feature: int, shares: Sequence[float] = (0.25, 0.5, 0.75, 0.95)) -> list[float]:
        """Quantiles of its values where it is on, from the histogram (to the width of a bin: a factor of 1.41)."""
        counts = self.histogram[feature].double()
        total = counts.sum()
        if total == 0:
            return [float("nan")] * len(shares)
        below = counts.cumsum(0) / total
        found = []
        for share in shares:
            at = int((below < share).sum())
            before = float(below[at - 1]) if at else 0.0
            inside = (share - before) / max(float(below[at]) - before, 1e-12)
            low, high = float(self.edges[at]), min(float(self.edges[at + 1]), float(self.maxima[feature]))
            found.append(low + inside * (max(high, low) - low))
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "sequences": self.sequences,
            "typical_norm": self.typical_norm,
            "maxima": self.maxima.tolist(),
            "density": self.density.tolist(),
        }


def max_examples(
    model: nn.Module,
    dictionary: Any,
    data: Any,
    *,
    top: int = 20,
    sample: int = 12,
    gradient: Gradient | None = None,
    exclude: Any = "special",
    batch_size: int | None = None,
    seed: int = 0,
) -> Examples:
    """The strongest examples of every feature, a sample of its values, its histogram, density and maximum, in one pass over the data.

    Args:
        data: as :class:`lineament.dictionaries.sequences.Sequences` takes it: token ids, ``(inputs, targets)``, a ``Dataset``, a ``DataLoader`` ...
        top: how many examples a feature, each from another sequence. sample: how many values drawn at random.
        gradient: ``"labels"``, ``"sampled"`` or ``"max_logit"``: also the importance \\|f w·g\\| of each feature, for one backward pass more.
        exclude: ``"special"``: BOS, EOS and padding are context and no examples; token ids, or ``None``.
        batch_size: sequences at a time; by default as many as have about 4,096 positions.

    Raises:
        InputError: an unknown site, data without a single activation, a dictionary of another width.

    >>> from lineament.dictionaries import Neurons
    >>> net, x = nn.Sequential(nn.Identity()), torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, -1.0]])
    >>> found = max_examples(net, Neurons(2, site="0"), x, top=2)
    >>> found.top[0].tolist(), [place[0] for place in found.places(0)], found.density[0].item()
    ([3.0, 2.0], [1, 2], 1.0)
    """
    number("top", top, low=1, integer=True)
    number("sample", sample, low=0, integer=True)
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    wanted = checked_gradient(gradient)
    site = site_in(model, dictionary)
    sequences = Sequences(model, data, exclude=exclude)
    state: _State | None = None
    atoms: Any = None
    with frozen(model):
        for batch in progress(_batches(sequences, batch_size), "looking for examples"):
            x, g, shape = _activations(model, site, batch, wanted, seed)
            kept, places = _places(batch, shape)
            x = x.reshape(-1, x.shape[-1])[kept]
            if not len(x):
                continue
            with torch.no_grad():
                codes = dictionary.codes(x)
            if state is None:
                state = _State(codes.width, top, sample, x, wanted is not None)
            state.update(codes, places[kept], x, generator)
            if g is not None:
                atoms = dictionary.atoms if atoms is None else atoms
                state.weigh(codes, atoms, g.reshape(-1, g.shape[-1])[kept])
            state.sequences += len(batch)
    if state is None:
        raise InputError("data: it gives no activations (all special tokens?), expected at least one")
    return state.result()


class _State:
    """What is kept of each feature while batches come."""

    def __init__(self, width: int, top: int, sample: int, x: Tensor, weighs: bool):
        device = x.device
        self.width, self.rows, self.sequences, self.norms = width, 0, 0, 0.0
        norm = float(x.float().norm(dim=1).mean())
        self.first_norm = norm if norm > 0 and math.isfinite(norm) else 1.0
        self.top = torch.full((width, top), -math.inf, device=device)
        self.top_places = torch.full((width, top), -1, dtype=torch.long, device=device)
        self.keys = torch.full((width, sample), -math.inf, device=device)
        self.sample = torch.zeros(width, sample, device=device)
        self.sample_places = torch.full((width, sample), -1, dtype=torch.long, device=device)
        self.histogram = torch.zeros(width * BINS, dtype=torch.int32, device=device)
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(width, device=device)
        self.importance = torch.zeros(width, dtype=torch.float64, device=device) if weighs else None

    def update(self, codes: Codes, places: Tensor, x: Tensor, generator: torch.Generator) -> None:
        on = codes.values != 0
        features, values = codes.indices[on], codes.values[on].float()
        where = places[:, None].expand_as(codes.indices)[on]
        self.rows += len(x)
        self.norms += float(x.float().norm(dim=1).double().sum())
        self.sums.index_add_(0, features, values.double())
        self.maxima.scatter_reduce_(0, features, values, "amax")
        level = 2 * ((values / self.first_norm).clamp_min(1e-30).log2() - _LOWEST)
        bins = features * BINS + level.floor().clamp(0, BINS - 1).long()
        self.histogram += torch.bincount(bins, minlength=len(self.histogram)).to(torch.int32)
        self._keep_top(features, values, where)
        if self.sample.shape[1]:
            # The largest of random numbers are a fair sample of all that came.
            keys = torch.rand(len(values), generator=generator).to(values.device)
            _, chosen = _first_of(features, keys, self.sample.shape[1])
            features, places_ = features[chosen], where[chosen]
            _merge(
                features,
                keys[chosen],
                self.keys,
                (self.sample, values[chosen]),
                (self.sample_places, places_),
            )

    def _keep_top(self, features: Tensor, values: Tensor, where: Tensor) -> None:
        # Nothing below the least that is kept can enter.
        likely = values > self.top[features, -1]
        features, values, where = features[likely], values[likely], where[likely]
        # Of each sequence the largest alone, also across batches of its positions.
        sequence = where // _STRIDE
        order = values.argsort(descending=True, stable=True)
        order = order[sequence[order].argsort(stable=True)]
        order = order[features[order].argsort(stable=True)]
        first = torch.ones(len(order), dtype=torch.bool, device=order.device)
        f, s = features[order], sequence[order]
        first[1:] = (f[1:] != f[:-1]) | (s[1:] != s[:-1])
        order = order[first]
        features, values, where = features[order], values[order], where[order]
        _, chosen = _first_of(features, values, self.top.shape[1])
        _merge(features[chosen], values[chosen], self.top, (self.top_places, where[chosen]))

    def weigh(self, codes: Codes, atoms: Tensor, g: Tensor) -> None:
        """Add \\|f w·g\\| of each active feature."""
        assert self.importance is not None
        size = max(1, 2**24 // max(1, codes.indices.shape[1] * atoms.shape[1]))
        for start in range(0, len(g), size):
            rows = slice(start, start + size)
            indices, values = codes.indices[rows], codes.values[rows]
            slope = torch.bmm(atoms[indices], g[rows].to(atoms)[:, :, None])[..., 0]
            self.importance.index_add_(0, indices.flatten(), (values * slope).abs().double().flatten())

    def result(self) -> Examples:
        counts = self.histogram.view(self.width, BINS).sum(1)
        none = self.top_places < 0
        edges = self.first_norm * 2 ** (_LOWEST + 0.5 * torch.arange(BINS + 1.0))
        return Examples(
            width=self.width,
            rows=self.rows,
            sequences=self.sequences,
            typical_norm=self.norms / self.rows,
            maxima=self.maxima.cpu(),
            density=(counts / self.rows).cpu(),
            means=(self.sums / counts.clamp_min(1)).float().cpu(),
            top=self.top.masked_fill(none, 0.0).cpu(),
            top_places=self.top_places.cpu(),
            sample=self.sample.cpu(),
            sample_places=self.sample_places.cpu(),
            histogram=self.histogram.view(self.width, BINS).cpu(),
            edges=edges,
            importance=None if self.importance is None else (self.importance / self.rows).float().cpu(),
        )


def _first_of(features: Tensor, keys: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ranks within its feature by descending key, and the entries whose rank is below ``most``, by feature and rank."""
    order = keys.argsort(descending=True, stable=True)
    order = order[features[order].argsort(stable=True)]
    rank = _ranks(features[order])
    return rank[rank < most], order[rank < most]


def _ranks(ordered: Tensor) -> Tensor:
    """Of features in order, each entry's place among those of its feature."""
    place = torch.arange(len(ordered), device=ordered.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return place - torch.where(starts, place, torch.zeros_like(place)).cummax(0).values


def _merge(features: Tensor, keys: Tensor, best: Tensor, *others: tuple[Tensor, Tensor]) -> None:
    """Put entries (by feature and rank) among the best of their features, in place; ``others`` are (state, values) that go along."""
    if not len(features):
        return
    most = best.shape[1]
    active, row = features.unique_consecutive(return_inverse=True)
    rank = _ranks(features)

    def spread(values: Tensor, filler: float) -> Tensor:
        out = torch.full((len(active), most), filler, dtype=values.dtype, device=values.device)
        out[row, rank] = values
        return out

    both = torch.cat([best[active], spread(keys.to(best.dtype), -math.inf)], 1)
    kept, places = both.topk(most, 1)
    best[active] = kept
    for state, values in others:
        merged = torch.cat(
            [state[active], spread(values.to(state.dtype), -1 if not state.is_floating_point() else 0)], 1
        )
        state[active] = merged.gather(1, places)


@dataclass(frozen=True)
class Window:
    """One example of a feature: the tokens around it, and the feature's value at each.

    Attributes:
        sequence, position: where it is. value: the feature's there. centre: its place in ``tokens``.
        tokens: ids; empty where the inputs are no tokens. values: the feature's values at these, or at all positions of a map.
        shape: of a map (height, width); empty otherwise.
    """

    sequence: int
    position: int
    value: float
    centre: int = 0
    tokens: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    shape: tuple[int, ...] = field(default=())


def windows(
    model: nn.Module,
    dictionary: Any,
    data: Any,
    examples: Examples,
    *,
    features: Sequence[int] | None = None,
    before: int = 12,
    after: int = 6,
    exclude: Any = "special",
) -> dict[int, dict[str, list[Window]]]:
    """The tokens around each example, with the feature's value at every one of them: {feature: {"top": ..., "sample": ...}}.

    One more pass over the sequences that have examples.

    Args:
        data: the same data. features: by default all that were ever on.
        before, after: how many tokens around an example.

    >>> from lineament.dictionaries import Neurons
    >>> net, ids = nn.Sequential(nn.Embedding(9, 2)), torch.tensor([[1, 2, 3, 4]])
    >>> _ = net[0].weight.data.copy_(torch.arange(18.0).view(9, 2))
    >>> sae = Neurons(2, site="0")
    >>> found = windows(net, sae, ids, max_examples(net, sae, ids, top=1), features=[0], before=1)
    >>> found[0]["top"][0].tokens, found[0]["top"][0].values
    ((3, 4), (6.0, 8.0))
    """
    site, sequences = site_in(model, dictionary), Sequences(model, data, exclude=exclude)
    chosen = (examples.maxima != 0).nonzero()[:, 0].tolist() if features is None else list(features)
    found: dict[int, dict[str, list[Window]]] = {feature: {"top": [], "sample": []} for feature in chosen}
    asked: dict[int, list[tuple[int, str, int, float]]] = {}
    for feature in chosen:
        for which in ("top", "sample"):
            for sequence, position, value in examples.places(feature, which):
                asked.setdefault(sequence, []).append((feature, which, position, value))
    with frozen(model), torch.no_grad():
        for batch in progress(_of_sequences(sequences, sorted(asked)), "reading the examples"):
            x, _, shape = _activations(model, site, batch, None, 0)
            rows = x.reshape(len(batch), -1, x.shape[-1])
            codes = dictionary.codes(rows)
            for k, sequence in enumerate(batch.index.tolist()):
                for feature, which, position, value in asked.get(sequence, ()):
                    window = _window(codes, batch, k, feature, position, (before, after), shape)
                    found[feature][which].append(Window(sequence, position, value, *window))
    for each in found.values():
        for which in each:
            each[which].sort(key=lambda window: -window.value)
    return found


def _window(
    codes: Codes,
    batch: Batch,
    k: int,
    feature: int,
    position: int,
    around: tuple[int, int],
    shape: torch.Size,
) -> tuple[int, tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    if batch.ids is not None and batch.ids.shape == shape:
        low, high = max(0, position - around[0]), min(shape[1], position + around[1] + 1)
        part = slice(low, high)
        values = (codes.values[k, part] * (codes.indices[k, part] == feature)).sum(-1)
        there = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
        real = torch.ones(high - low, dtype=torch.bool) if there is None else there[k, part].bool().cpu()
        tokens = batch.ids[k, part].cpu()[real].tolist()
        centre = int(real[: position - low].sum())
        return centre, tuple(tokens), tuple(values.cpu()[real].tolist()), ()
    if len(shape) < 2:
        return 0, (), (), ()
    values = (codes.values[k] * (codes.indices[k] == feature)).sum(-1)
    return 0, (), tuple(values.tolist()), tuple(shape[1:])


def detection_score(
    examples: dict[int, dict[str, list[Window]]],
    judge: Callable[[list[str], list[str]], Sequence[bool]],
    *,
    decode: Callable[[Sequence[int]], str],
    shown: int = 5,
    asked: int = 5,
    seed: int = 0,
) -> dict[int, float]:
    """Can a reader who sees a feature's strongest examples tell others of it from examples of other features? Balanced accuracy of each; chance is 0.5.

    Args:
        examples: from :func:`windows`.
        judge: given ``shown`` snippets in which the feature is on and a list of unknown ones, says of each whether it is on: a person, a language model.
        decode: token ids to text, ``tokenizer.decode``.
        shown, asked: how many of its top snippets are shown, and how many of its own and of other features' are asked about.

    Returns:
        {feature: score}, for the features with more than ``shown`` examples.

    Raises:
        InputError: a judge that answers something other than one truth value for each snippet.

    >>> found = {f: {"top": [Window(i, 0, 1.0, 0, (f, i)) for i in range(8)]} for f in (1, 2)}
    >>> detection_score(found, lambda shown, asked: [text[0] == shown[0][0] for text in asked], decode=lambda ids: f"{ids[0]} {ids[1]}")
    {1: 1.0, 2: 1.0}
    """
    number("shown", shown, low=1, integer=True)
    number("asked", asked, low=1, integer=True)
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    texts = {f: _snippets(each, decode) for f, each in examples.items()}
    scores: dict[int, float] = {}
    for feature, own in texts.items():
        others = [
            text for other, found in texts.items() if other != feature for text in found if text not in own
        ]
        if len(own) <= shown or not others:
            continue
        true = own[shown : shown + asked]
        false = [others[i] for i in torch.randperm(len(others), generator=generator)[:asked].tolist()]
        order = torch.randperm(len(true) + len(false), generator=generator).tolist()
        mixed = [*true, *false]
        answers = list(judge(own[:shown], [mixed[i] for i in order]))
        require(
            len(answers) == len(order),
            f"judge: answered {len(answers)} times, expected one truth value for each of {len(order)} snippets",
        )
        said = dict(zip(order, map(bool, answers)))
        hits = sum(said[i] for i in range(len(true))) / len(true)
        rejections = sum(not said[i] for i in range(len(true), len(mixed))) / len(false)
        scores[feature] = (hits + rejections) / 2
    return scores


def _snippets(found: dict[str, list[Window]], decode: Callable[[Sequence[int]], str]) -> list[str]:
    return list(dict.fromkeys(decode(list(w.tokens)) for w in found["top"] if w.tokens))


def _batches(sequences: Sequences, batch_size: int | None) -> Iterator[Batch]:
    if batch_size is None and sequences.indexed:
        one = sequences.take(torch.zeros(1, dtype=torch.long))
        positions = one.ids.shape[1] if one.ids is not None else 64
        batch_size = max(1, TOKENS_AT_ONCE // positions)
    return sequences.walk(batch_size or 1)


def _of_sequences(sequences: Sequences, places: list[int]) -> Iterator[Batch]:
    if not sequences.indexed:
        return sequences.walk(1)
    if not places:
        return iter(())
    size = max(1, TOKENS_AT_ONCE // 64)
    return (sequences.take(part) for part in torch.tensor(places).split(size))


def _activations(
    model: nn.Module, site: Site, batch: Batch, gradient: Any, seed: int
) -> tuple[Tensor, Tensor | None, torch.Size]:
    """x and the gradient with features last, and the shape of its positions."""
    wants = gradient is not None
    with (
        torch.set_grad_enabled(wants),
        capture(model, site.name, gradients=wants, stop_early=not wants) as acts,
    ):
        output = batch.call(model)
    x = features_last(acts[site.name].detach(), site)
    require(x.is_floating_point(), f"site {site.name!r}: {x.dtype} passes there, expected real numbers")
    slope = None
    if wants:
        slope = features_last(acts.gradients(objective(gradient, output, batch, seed))[site.name], site)
    return x, slope, x.shape[:-1]


def _places(batch: Batch, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Which rows of a site count, and the number of each row's place."""
    inner = max(1, shape[1:].numel())
    position = torch.arange(inner).repeat(shape[0])
    places = batch.index.repeat_interleave(inner) * _STRIDE + position
    aligned = batch.mask is not None and batch.mask.shape == shape
    kept = (
        batch.mask.reshape(-1).cpu()
        if aligned and batch.mask is not None
        else torch.ones(len(places), dtype=torch.bool)
    )
    return kept, places
