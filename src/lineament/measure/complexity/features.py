"""Features of whatever kind, and the activations they are read from, batch by batch: what every measure of this wing walks over.

A feature is a column of numbers with one row a sample, a position, or a token. It comes from a dictionary at its site (any that keeps
:class:`lineament.core.codes.Dictionary`), from the units of a site, from labels, from an array, or from a function of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checks import InputError, require
from lineament.core.codes import Dictionary
from lineament.core.models import called, device_of, dtype_of, frozen, logits
from lineament.core.sites.activations import capture
from lineament.core.sites.depth import default_sites, tokens_of
from lineament.core.sites.naming import sites as site_names
from lineament.train.batches import Indexed, moved, source

Features: TypeAlias = "Dictionary | str | Tensor | np.ndarray[Any, Any] | Callable[[Any], Tensor]"
ROWS = ("samples", "positions", "max")
_BATCH = 256
_WIDEST = 16384  # the covariance of a site of this width takes 2 GiB


@dataclass(frozen=True)
class Look:
    """One batch as rows.

    Attributes:
        activations: {site: (rows, width)}.
        z: (rows, features).
        samples: the number of each row's sample, from 0; ``None`` where each row is one.
        inputs: what the model was given.
        form: makes rows of what passed at a site.
    """

    activations: dict[str, Tensor]
    z: Tensor
    samples: Tensor | None
    inputs: Any
    form: Callable[[str, Tensor], Tensor]


class Reading:
    """A model, data and features: what is walked over, in the training split and in the held-out one.

    Args:
        features: see :data:`Features`; ``"labels"`` are the targets (classes as indicators), another text is a site whose units are the features.
        sites: where activations are read, in depth order; ``None`` takes the blocks of the model.
        pool: maps become ``pool`` x ``pool`` averages, texts ``pool`` parts; ``"full"`` keeps every position.
        rows: ``"samples"`` (maps and texts are averaged over positions before a dictionary sees them), ``"max"`` (it sees every
            position, and the maximum counts), ``"positions"`` (each position or token is a row; other sites are brought to its
            grid), ``None``: positions for models that read tokens, else samples.
        heldout: the fraction of samples that the read-outs are judged on, or other data for that.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        features: Features,
        *,
        sites: str | Iterable[str] | None = None,
        pool: int | str = 1,
        rows: str | None = None,
        heldout: Any = 0.2,
        seed: int = 0,
    ) -> None:
        self.model, self.data, self.heldout = model, in_one_order(data), heldout
        if isinstance(heldout, (int, float)):
            checks.number("heldout", heldout, low=0, high=1, open_low=True, open_high=True)
        else:
            self.heldout = in_one_order(heldout)
        self.pool = pool if pool == "full" else checks.number("pool", pool, low=1, integer=True)
        self.seed = checks.seed("seed", seed)
        inputs, targets = first_batch(self.data)
        self.tokens = reads_tokens(inputs)
        self.rows = checks.one_of("rows", rows or ("positions" if self.tokens else "samples"), ROWS)
        if sites is None:
            require(
                isinstance(inputs, Tensor),
                "sites: name them, such as sites='h.*': without, they are found for inputs that are one tensor",
            )
            sites = default_sites(model, self._given(inputs[:2]))
        wanted = [sites] if isinstance(sites, str) else checks.listed("sites", sites, "sites or globs")
        self.sites = list(
            dict.fromkeys(name for pattern in wanted for name in site_names(model, str(pattern)))
        )
        self.features, self.site = features, site_of(model, features)
        self.classes = 0
        if isinstance(features, str) and features == "labels" and self.site is None:
            self.classes = self._classes(inputs, targets)
        self.array: Tensor | None = None
        if isinstance(features, (Tensor, np.ndarray)):
            array = torch.from_numpy(features) if isinstance(features, np.ndarray) else features
            require(
                array.ndim in (1, 2, 3),
                f"features: got {checks.show(features)}, expected (samples, features), or (samples, positions, features)",
            )
            self.array = array[:, None] if array.ndim == 1 else array
            require(
                not self._elsewhere,
                "features: got an array, which has no rows for the data of heldout=; pass heldout= as a fraction of the samples",
            )

    @property
    def _elsewhere(self) -> bool:
        return not isinstance(self.heldout, (int, float))

    def _given(self, inputs: Any) -> Any:
        return moved(inputs, device_of(self.model), dtype_of(self.model))

    def _classes(self, inputs: Any, targets: Any) -> int:
        require(isinstance(targets, Tensor), "features='labels': the data have no targets")
        if targets.is_floating_point() or targets.ndim != 1:
            return 0
        with frozen(self.model), torch.no_grad():
            return max(2, logits(called(self.model, self._given(inputs))).shape[-1])

    def walk(self, part: str = "all", what: str = "complexity") -> Iterator[Look]:
        """The batches of ``"train"``, ``"heldout"`` or ``"all"``, in the order of the data, in eval mode and without gradients."""
        elsewhere = self._elsewhere
        data = self.heldout if part == "heldout" and elsewhere else self.data
        choose = None
        if part != "all" and not elsewhere:
            choose = Choice(self.heldout, self.seed, part == "heldout")
        read = [*self.sites, *([self.site] if self.site and self.site not in self.sites else [])]
        with frozen(self.model, requires_grad=None), torch.no_grad(), capture(self.model, read, stop_early=True) as acts:  # fmt: skip
            for inputs, targets, index in progress(batches(data, choose), what):
                given = self._given(inputs)
                called(self.model, given)
                seen = {site: tokens_of(self.model, site, acts[site]) for site in read}
                yield self.rows_of(seen, given, targets, index)

    def rows_of(
        self, acts: Mapping[str, Tensor], inputs: Any, targets: Any, index: Tensor | None = None
    ) -> Look:
        """The rows of a batch, from what passed at the sites."""
        z, grid = self.codes(acts, inputs, targets, index)
        keep = self._kept(inputs, z)
        samples = None

        def vectors(site: str, activations: Tensor) -> Tensor:
            return pooled(site, activations, self.pool, keep)

        if self.rows == "positions" and z.ndim == 3:
            count = z.shape[1]
            chosen = torch.ones(len(z) * count, dtype=torch.bool, device=z.device)
            chosen = chosen if keep is None else keep.to(z.device).flatten()
            numbers = torch.arange(len(z), device=z.device).repeat_interleave(count)[chosen]
            samples = torch.unique_consecutive(numbers, return_inverse=True)[1]
            z = z.flatten(0, 1)[chosen]

            def form(site: str, activations: Tensor) -> Tensor:
                return at_positions(site, activations, grid, count).flatten(0, 1)[chosen]
        else:
            form = vectors
            if z.ndim == 3:
                z = z.amax(1) if self.rows == "max" else z.mean(1)
        return Look({site: form(site, acts[site]) for site in self.sites}, z, samples, inputs, form)

    def codes(
        self, acts: Mapping[str, Tensor], inputs: Any, targets: Any, index: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The features of a batch, (samples, features) or (samples, positions, features), and the grid of the positions."""
        features = self.features
        if self.site is not None:
            activations = acts[self.site]
            require(
                activations.is_floating_point(),
                f"site {self.site!r} holds {checks.show(activations)}, expected real numbers",
            )
            grid = grid_of(activations)
            x = positions(self.site, activations)
            if self.rows == "samples":
                keep = self._kept(inputs, x)
                x = x.mean(1) if keep is None else masked_mean(x, keep)
            elif not grid:
                x = x[:, 0]
            z = x if isinstance(features, str) else encoded(features, x)  # pyright: ignore[reportArgumentType]
            if self.rows == "max" and z.ndim == 3:
                keep = self._kept(inputs, z)
                z = (z if keep is None else z.masked_fill(~keep[..., None], -math.inf)).amax(1)
            return z, grid
        if self.array is not None:
            require(index is not None, "features: the data do not say which samples a batch holds")
            at = index.cpu()  # pyright: ignore[reportOptionalMemberAccess]
            require(
                int(at.max()) < len(self.array),
                f"features: got {len(self.array)} rows, expected one for each sample; the data have sample {int(at.max())}",
            )
            z = self.array[at].to(device_of(self.model))
        elif features == "labels":
            require(isinstance(targets, Tensor), "features='labels': the data have no targets")
            labels = targets.to(device_of(self.model))
            if self.classes:
                z = F.one_hot(checks.labels("labels", labels, classes=self.classes), self.classes).float()
            else:
                z = labels.reshape(len(labels), -1)
        else:
            z = features(inputs)  # pyright: ignore[reportCallIssue]
            require(
                isinstance(z, Tensor) and z.ndim in (1, 2, 3),
                f"features(inputs): got {checks.show(z)}, expected a tensor of shape (samples, features)",
            )
            z = z[:, None] if z.ndim == 1 else z
        return z, ((z.shape[1],) if z.ndim == 3 else ())

    def _kept(self, inputs: Any, z: Tensor) -> Tensor | None:
        """The attention mask, where the positions are its tokens."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        return None if z.ndim == 3 and mask.shape != z.shape[:2] else mask.bool()


def site_of(model: nn.Module, features: Any) -> str | None:
    """The site whose activations the features are made of; ``None`` for labels, arrays and functions of the inputs."""
    if isinstance(features, str):
        if features == "labels" and "labels" not in dict(model.named_modules()):
            return None
        found = site_names(model, features)
        require(
            len(found) == 1,
            f"features: {features!r} names {len(found)} sites ({', '.join(found)}), expected one",
        )
        return found[0]
    if hasattr(features, "encode"):
        site = getattr(features, "site", None)
        require(
            isinstance(site, str),
            "features: the dictionary does not say at which site of the model it was trained; set its site, such as dictionary.site = 'layer4'",
        )
        return site_names(model, str(site))[0]
    require(
        isinstance(features, (Tensor, np.ndarray)) or callable(features),
        f"features: got {checks.show(features)}, expected a dictionary, a site, 'labels', an array (samples, features) or a function of the inputs",
    )
    return None


def encoded(dictionary: Dictionary, x: Tensor) -> Tensor:
    """The codes of activations, which must be of the dictionary's width."""
    width = dictionary.atoms.shape[-1]
    require(
        x.shape[-1] == width,
        f"features: the dictionary's atoms have {width} numbers, but site {dictionary.site!r} has {x.shape[-1]} a position",
    )
    return dictionary.encode(x.to(dictionary.atoms.dtype)).detach()


def reads_tokens(inputs: Any) -> bool:
    """Whether a model is given token ids."""
    if isinstance(inputs, Mapping):
        return "input_ids" in inputs
    return isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point()


def grid_of(activations: Tensor) -> tuple[int, ...]:
    """The shape of the positions: (tokens,) or (height, width); () for one vector a sample."""
    if activations.ndim <= 2:
        return ()
    return tuple(activations.shape[1:2] if activations.ndim == 3 else activations.shape[2:])


def positions(site: str, activations: Tensor) -> Tensor:
    """(samples, positions, width) of a map (batch, channels, height, width), tokens (batch, tokens, width) or vectors.

    >>> positions("conv", torch.ones(2, 3, 4, 5)).shape, positions("fc", torch.ones(2, 3)).shape
    (torch.Size([2, 20, 3]), torch.Size([2, 1, 3]))
    """
    require(
        activations.ndim >= 2,
        f"site {site!r}: got {checks.show(activations)}, expected (batch, width), a map or a sequence of tokens",
    )
    if activations.ndim == 2:
        return activations[:, None]
    return activations if activations.ndim == 3 else activations.flatten(2).transpose(1, 2)


def masked_mean(x: Tensor, keep: Tensor) -> Tensor:
    """The mean over the positions that count."""
    weight = keep[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def pooled(site: str, activations: Tensor, pool: int | str = 1, keep: Tensor | None = None) -> Tensor:
    """One vector a sample: maps averaged to ``pool`` x ``pool``, tokens to ``pool`` parts; ``"full"`` keeps all.

    >>> pooled("conv", torch.ones(2, 3, 4, 4), 2).shape, pooled("block", torch.ones(2, 7, 5), "full").shape
    (torch.Size([2, 12]), torch.Size([2, 35]))
    """
    require(
        activations.ndim >= 2 and (activations.is_floating_point() or activations.ndim == 2),
        f"site {site!r}: got {checks.show(activations)}, expected real numbers (batch, width), a map or a sequence of tokens",
    )
    if activations.ndim > 2 and pool != "full":
        grid = grid_of(activations)
        if keep is not None and pool == 1 and activations.ndim == 3 and keep.shape == activations.shape[:2]:
            return masked_mean(activations, keep)
        if pool == 1:
            activations = activations.mean(1) if activations.ndim == 3 else activations.flatten(2).mean(2)
        else:
            maps = activations.transpose(1, 2) if activations.ndim == 3 else activations
            reduce = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
            activations = reduce(maps, [min(int(pool), size) for size in grid])  # pyright: ignore[reportArgumentType]
    flat = activations.flatten(1)
    require(
        flat.shape[1] <= _WIDEST,
        f"pool: got {pool!r}, which leaves {flat.shape[1]} numbers at site {site!r}, whose covariance takes {flat.shape[1] ** 2 * 8 / 2**30:.0f} GiB; "
        "pass a smaller pool",
    )
    return flat


def at_positions(site: str, activations: Tensor, grid: tuple[int, ...], count: int) -> Tensor:
    """(samples, positions, width) at the positions of a grid: averaged where it is coarser, interpolated where it is finer."""
    if activations.ndim >= 4 and len(grid) == activations.ndim - 2 and tuple(activations.shape[2:]) != grid:
        finer = any(want > have for want, have in zip(grid, activations.shape[2:]))
        mode = ("bilinear" if len(grid) == 2 else "trilinear") if finer else "area"
        activations = F.interpolate(
            activations, size=grid, mode=mode, **({"align_corners": False} if finer else {})
        )
    found = positions(site, activations)
    require(
        found.shape[1] == count,
        f"site {site!r}: has {found.shape[1]} positions, the features have {count}; pass rows='samples', or sites with as many",
    )
    return found


class Choice:
    """Which samples belong to a split: each at random with a probability, in the order of the data, the same in every walk."""

    def __init__(self, fraction: float, seed: int, heldout: bool) -> None:
        self.fraction, self.heldout = fraction, heldout
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, count: int) -> Tensor:
        """The places, among the next ``count`` samples, of those that belong to it."""
        chosen = torch.rand(count, generator=self.generator, dtype=torch.float64) < self.fraction
        return (chosen == self.heldout).nonzero().flatten()


def in_one_order(data: Any) -> Any:
    """Data that give the same samples in the same order in every walk: paths are read, loaders that shuffle do not."""
    if isinstance(data, (str, Path)):
        from lineament.load.data import load_data

        data = load_data(data, samples=2**31)
    if isinstance(data, DataLoader):
        order: Any = data.sampler
        if isinstance(order, (RandomSampler, WeightedRandomSampler)):
            order = None
        elif isinstance(order, SubsetRandomSampler):
            order = list(order.indices)
        else:
            return data
        size = data.batch_size or _BATCH
        return DataLoader(
            data.dataset, size, sampler=order, collate_fn=data.collate_fn, num_workers=data.num_workers
        )
    require(
        not isinstance(data, Iterator),
        "data: got an iterator, which can be walked once; expected (inputs, targets), a Dataset, a DataLoader or a list of batches",
    )
    return data


def batches(data: Any, choose: Callable[[int], Tensor] | None = None) -> Iterator[tuple[Any, Any, Tensor]]:
    """(inputs, targets or None, indices of the samples) of data in any form, of the chosen samples only."""
    if isinstance(data, (Tensor, np.ndarray)):
        data = torch.as_tensor(data)
        data = (data, torch.zeros(len(data)))
    listed = isinstance(data, (list, DataLoader)) or not hasattr(data, "__len__")
    found = None if listed and not _pair(data) else source(data)
    if isinstance(found, Indexed):
        rows = torch.arange(len(found)) if choose is None else choose(len(found))
        for part in rows.split(_BATCH):
            if len(part):
                taken = found.take(part)
                yield taken.inputs, taken.targets, part
        return
    start = 0
    for batch in data:
        inputs, targets = _parts(batch)
        count = _length(inputs)
        at = torch.arange(count) if choose is None else choose(count)
        if len(at):
            whole = len(at) == count
            taken = (inputs, targets) if whole else (_at(inputs, at, count), _at(targets, at, count))
            yield *taken, start + at
        start += count


def first_batch(data: Any) -> tuple[Any, Any]:
    """Inputs and targets of the first samples."""
    for inputs, targets, _ in batches(data):
        return inputs, targets
    raise InputError("data: got no batches, expected at least one")


def _pair(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray))


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        return {key: value for key, value in batch.items() if key != "labels"}, labels
    if isinstance(batch, (tuple, list)):
        require(len(batch) > 0, "data: got an empty batch, expected (inputs, targets)")
        return batch[0], batch[1] if len(batch) > 1 else None
    if isinstance(batch, Tensor):
        return batch, None
    raise InputError(f"data: got a batch {checks.show(batch)}, expected (inputs, targets)")


def _length(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise InputError(f"data: got inputs {checks.show(inputs)}, expected tensors")
    return len(first)


def _at(value: Any, rows: Tensor, count: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _at(item, rows, count) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_at(item, rows, count) for item in value)
    fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[rows.to(value.device)] if fits else value


def feature_function(
    model: nn.Module, features: Features, *, rows: str = "samples", gradients: bool = False
) -> Callable[[Tensor], Tensor]:
    """The features of a model's inputs as a function: (samples, ...) -> (samples, features).

    Args:
        features: a dictionary, a site or a function of the inputs.
        rows: ``"samples"`` averages activations over positions before they are encoded, ``"max"`` takes the maximum over positions.
        gradients: let gradients flow to the inputs.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> feature_function(net, "1")(torch.zeros(4, 2)).shape
    torch.Size([4, 2])
    """
    site = site_of(model, features)
    checks.one_of("rows", rows, ("samples", "max"))
    if site is None:
        require(
            callable(features),
            f"features: got {checks.show(features)}, which says nothing of other inputs; expected a dictionary, a site or a function of the inputs",
        )
        return features  # pyright: ignore[reportReturnType]

    def function(inputs: Tensor) -> Tensor:
        with frozen(model), torch.set_grad_enabled(gradients), capture(model, site, gradients=gradients, stop_early=True) as acts:  # fmt: skip
            called(model, moved(inputs, device_of(model), dtype_of(model)))
        x = positions(site, tokens_of(model, site, acts[site]))
        if isinstance(features, str):
            return x.mean(1) if rows == "samples" else x.amax(1)
        dictionary: Any = features
        if rows == "samples":
            return dictionary.encode(x.mean(1))
        return dictionary.encode(x).amax(1)

    return function
