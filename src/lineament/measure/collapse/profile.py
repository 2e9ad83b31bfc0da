"""Neural collapse of a model over a loader: every site in one pass of forwards, for little more than the forwards cost.

Tirer, Huang, Niles-Weed (2022, arXiv 2210.16658) follow NC1~ from layer to layer; Papyan et al. (2020) ask of the last one
whether the network decides by the nearest class mean. Sums are gathered while the forwards run. NC4 (and NC1 without a features x
features matrix) asks for the samples again once their means are known: pooled features are small, so they are kept
up to ``keep_bytes``, and only what does not fit needs ``passes=2``, which runs the forwards a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks, results, shards
from lineament.core.batching import progress
from lineament.core.checks import InputError, require
from lineament.core.loaders import batches_of
from lineament.core.models import called, decided, device_of, frozen, held_weight, logits, moved
from lineament.core.results import Readable
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import tokens_of
from lineament.core.sites.naming import sites as site_names
from lineament.measure.collapse.metrics import CollapseMeter, CollapseMetrics, SecondLook

Pool = str | Callable[[Tensor], Tensor]
Samples = tuple[Tensor, Tensor, Tensor | None]  # features, labels, decisions
_POOLS = ("mean", "max", "first", "last", "flatten")
_WIDEST = 8192  # a features x features matrix in float64 of this width takes 512 MiB


@dataclass(frozen=True)
class CollapseProfile(Readable):
    """Collapse metrics of several sites of one model, in the order in which the sites were given.

    Attributes:
        metrics: {site: :class:`~lineament.measure.collapse.metrics.CollapseMetrics`}.
        head: the module whose weight gave NC3, or ``None``.
        samples: how many samples were measured.
    """

    metrics: dict[str, CollapseMetrics]
    head: str | None
    samples: int

    def __getitem__(self, site: str) -> CollapseMetrics:
        require(site in self.metrics, f"site {site!r} was not measured{checks.suggest(site, self.metrics)}")
        return self.metrics[site]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        found = {site: metrics.to_dict() for site, metrics in self.metrics.items()}
        return {"metrics": found, "head": self.head, "samples": self.samples}

    def plot(self, ax: Any = None) -> Any:
        """NC1~ (left axis, logarithmic) and NC2 (right axis) from site to site."""
        ax = results.axes(ax)
        names, values = list(self.metrics), list(self.metrics.values())
        places = range(len(names))
        lines = ax.semilogy(places, [m.nc1_tilde for m in values], "o-", color="C0", label="NC1~")
        ax.set_ylabel("NC1~ = tr S_W / tr S_B", parse_math=False)
        right = ax.twinx()
        lines += right.plot(places, [m.nc2 for m in values], "s--", color="C1", label="NC2")
        right.set_ylabel("NC2: distance from a simplex")
        right.set_ylim(bottom=0)
        ax.set_xticks(places, names, rotation=30, ha="right", parse_math=False)
        ax.legend(handles=lines, loc="best")
        return ax


def find_head(model: nn.Module) -> str | None:
    """The name of the last linear layer of a model (its classifier, in the usual order of modules), or ``None``.

    >>> find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    '2'
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def pooled(features: Tensor, pool: Pool = "mean") -> Tensor:
    """One vector a sample: ``(batch, features)`` from whatever passes at a site.

    ``"mean"`` and ``"max"`` go over positions: all but the channels of a map (batch, channels, height, width), the tokens
    of a sequence (batch, tokens, features). ``"first"`` and ``"last"`` take one token, ``"flatten"`` keeps everything, and a
    function is called with the tensor.

    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 7, 5)).shape
    (torch.Size([2, 3]), torch.Size([2, 5]))
    """
    if callable(pool):
        found = pool(features)
        checks.tensor("pool(features)", found, shape=("batch", "features"), floating=True, finite=False)
        return found
    checks.one_of("pool", pool, _POOLS)
    if features.ndim == 2:
        return features
    require(
        features.ndim >= 2,
        f"site: got {checks.show(features)}, expected (batch, features), a map or a sequence of tokens",
    )
    if pool == "flatten":
        return features.flatten(1)
    if pool in ("first", "last"):
        require(
            features.ndim == 3,
            f"pool={pool!r}: got {checks.show(features)}, expected (batch, tokens, features); use 'mean'",
        )
        return features[:, 0 if pool == "first" else -1]
    positions = (1,) if features.ndim == 3 else tuple(range(2, features.ndim))
    return features.mean(positions) if pool == "mean" else features.amax(positions)


def collapse(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    sites: str | Iterable[str] | None = None,
    pool: Pool = "mean",
    head: str | None = None,
    classes: int | None = None,
    weighting: str = "class",
    rcond: float | None = None,
    keep_bytes: int = 2**28,
    passes: int = 1,
) -> CollapseProfile:
    """Neural-collapse metrics of every site, in one pass of forwards over the loader (eval mode, no gradients).

    Args:
        model: any module; it is left as it was.
        loader: batches ``(inputs, labels)``; labels are (batch,), or (batch, tokens) to take each token of a sequence as a
            sample (negative labels are left out). Use the training data without augmentation.
        sites: sites or globs; by default the input of the head, the penultimate features.
        pool: how maps and token sequences become vectors, see :func:`pooled`.
        head: name of the linear classifier, for NC3; by default the last linear layer.
        classes: number of classes; ``None`` takes the largest label plus one.
        weighting, rcond: see :func:`~lineament.measure.collapse.metrics.collapse_metrics`.
        keep_bytes: pooled features are kept up to this size, from the last site backwards, so that NC4 needs no second
            forward. For a site that does not fit, NC1 comes from its scatter matrix and NC4 is ``None``.
        passes: 2 runs the forwards again for the sites that did not fit, which then lack nothing and need no
            features x features matrix.

    Returns:
        :class:`CollapseProfile`. NC4 compares the network's own decision with the nearest mean at each site; NC3 and
        self-duality are given at the head's input.

    Raises:
        InputError: an unknown site or head, labels that are not classes, a class without samples (named), no batches.

    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = collapse(net, [(x[:30], y[:30]), (x[30:], y[30:])], sites=["0", "2:in"])
    >>> sorted(found.metrics), found.head, found["2:in"].nc3 is not None, found["0"].nc3
    (['0', '2:in'], '2', True, None)
    """
    require(passes in (1, 2), f"passes: got {checks.show(passes)}, expected 1 or 2")
    loader = batches_of(loader, once=passes == 1)
    checks.number("keep_bytes", keep_bytes, low=0, integer=True)
    if not callable(pool):
        checks.one_of("pool", pool, _POOLS)
    weight, head = _head(model, head)
    if sites is None:
        if head is None:
            raise InputError(
                "sites: the model has no linear layer whose input could be taken; name the sites to measure"
            )
        sites = f"{head}:in"
    wanted = [sites] if isinstance(sites, str) else list(sites)
    names = list(dict.fromkeys(name for pattern in wanted for name in site_names(model, pattern)))
    require(bool(names), "sites: got none, expected at least one")

    kept: dict[str, list[Samples]] = {}
    meters: dict[str, CollapseMeter] = {}
    device = device_of(model)

    def prepare(batch: dict[str, Samples]) -> None:
        fitting = shards.agreed("what is kept", lambda: _fitting(batch, loader, keep_bytes))
        kept.update({name: [] for name in fitting})
        for name in names:
            wide = name in batch and batch[name][0].shape[1] > _WIDEST
            full = passes == 1 and name not in kept and not wide
            meters[name] = CollapseMeter(classes, weighting=weighting, scatter=full, rcond=rcond)

    def first(batch: dict[str, Samples]) -> None:
        if not meters:
            prepare(batch)
        for name, samples in batch.items():
            if name in kept:
                # Counted at the end, thousands of rows at a time.
                kept[name].append(samples)
            else:
                meters[name].update(*samples[:2])

    _walk(model, loader, names, pool, classes, "collapse", first)
    if not meters:  # this process's share is empty
        prepare({})
    looks: dict[str, SecondLook] = {}
    for name in names:
        samples = _joined(kept.pop(name)) if kept.get(name) else None
        if samples is not None:
            meters[name].update(*samples[:2])
        meters[name] = shards.merged(meters[name], device=device)
        require(meters[name].stream.count > 0, "loader: got no batches, expected at least one")
        if name in kept or samples is not None:
            look = meters[name].second_look()
            if samples is not None:
                look.update(*samples)
            looks[name] = shards.merged(look, device=device)
    rest = [name for name in names if name not in looks] if passes == 2 else []
    if rest:
        looks |= {name: meters[name].second_look() for name in rest}

        def second(batch: dict[str, Samples]) -> None:
            for name, samples in batch.items():
                looks[name].update(*samples)

        _walk(model, loader, rest, pool, classes, "collapse, second pass", second)
        looks |= {name: shards.merged(looks[name], device=device) for name in rest}
    found = {}
    for name in names:
        fits = weight is not None and name == f"{head}:in" and len(weight) == len(meters[name].stream.counts)
        found[name] = meters[name].compute(weight if fits else None, second=looks.get(name))
    return CollapseProfile(found, head, int(meters[names[0]].stream.counts.sum()))


def _head(model: nn.Module, name: str | None) -> tuple[Tensor | None, str | None]:
    if name is None:
        name = find_head(model)
        if name is None:
            return None, None
    modules = dict(model.named_modules())
    require(name in modules, f"head: the model has no module {name!r}{checks.suggest(name, modules)}")
    weight = getattr(modules[name], "weight", None)
    require(
        isinstance(weight, Tensor) and weight.ndim == 2,
        f"head: {name!r} is a {type(modules[name]).__name__}, expected a linear layer with a weight matrix",
    )
    assert isinstance(weight, Tensor)  # required above
    return held_weight(model, f"{name}.weight", weight), name


def _fitting(batch: Mapping[str, Any], loader: Any, keep_bytes: int) -> list[str]:
    """The sites whose features over the whole loader fit, chosen from the last one backwards."""
    try:
        count = len(loader)
    except TypeError:
        return []
    left, chosen = keep_bytes, []
    for name, (features, _, _) in reversed(list(batch.items())):
        size = features.numel() * features.element_size() * count
        if size <= left:
            left -= size
            chosen.append(name)
    return chosen


def _walk(
    model: nn.Module,
    loader: Iterable[Any],
    names: list[str],
    pool: Pool,
    classes: int | None,
    what: str,
    consume: Callable[[dict[str, Samples]], None],
) -> None:
    """Run the forwards and hand {site: (features, labels, decisions)} of each batch to ``consume``."""
    device = device_of(model)
    with frozen(model, requires_grad=None), torch.no_grad(), capture(model, names) as acts:
        for batch in progress(shards.mine(loader), what):
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise InputError(
                    f"loader: got a batch that is {checks.show(batch)}, expected (inputs, labels)"
                )
            inputs, labels = batch[0], batch[1]
            flat = checks.tensor("labels", labels, floating=False).flatten()
            checks.labels("labels", flat[flat >= 0] if labels.ndim == 2 else flat, classes=classes)
            try:
                decisions = decided(logits(called(model, moved(inputs, device))))
            except InputError:
                decisions = None
            there = labels.to(device)
            found = {name: tokens_of(model, name, acts[name]) for name in names}
            consume({name: _samples(found[name], there, decisions, pool) for name in names})


def _joined(batches: list[Samples]) -> Samples:
    features, labels, decisions = zip(*batches)
    known = [d for d in decisions if d is not None]
    whole = torch.cat(known) if len(known) == len(decisions) else None
    return torch.cat(features), torch.cat(labels), whole


def _samples(features: Tensor, labels: Tensor, decisions: Tensor | None, pool: Pool) -> Samples:
    """Features, labels and decisions with one row a sample; tokens are samples where the labels are by token."""
    if labels.ndim == 2 and features.ndim == 3 and labels.shape == features.shape[:2]:
        counted = labels >= 0
        decided = decisions[counted] if decisions is not None and decisions.shape == labels.shape else None
        return features[counted], labels[counted], decided
    require(
        labels.ndim == 1 and len(labels) == len(features),
        f"labels: got {checks.show(labels)} for {checks.show(features)} at the site, expected one label a sample "
        "(or one a token, for a site of shape (batch, tokens, features))",
    )
    fits = decisions is not None and decisions.shape == labels.shape
    return pooled(features, pool), labels, decisions if fits else None
