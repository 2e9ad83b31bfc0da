"""What do the layers of a network read on data, and how much of their output does each input give? One pass of forwards, no labels.

Kashyap et al., "ModHiFi", NeurIPS 2025, arXiv 2511.19566. No contribution A_ci is ever built. With M = E[φ φᵀ], the second moment of what a layer's weights
multiply (the patches of a convolution), b = W * (W M) holds the saliencies, and Q of every output follows from the same M. Saliencies alone need no M: W M is
the gradient of E |Y|² / 2 with respect to W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lineament.core.checks import NotFiniteError, require, suggest
from lineament.core.loaders import batches_of
from lineament.core.models import called, device_of, dtype_of, frozen, moved, rows_in
from lineament.core.results import Readable
from lineament.core.sites.hooks import tap
from lineament.core.sites.naming import resolve
from lineament.core.statistics.moments import Covariance
from lineament.core.surgery.folding import following_norms
from lineament.core.surgery.groups import plain_network
from lineament.edit.components import ComponentScores, similarity_from_moments
from lineament.edit.patches import batched, matrix, padding_of, patches, reads, widened
from lineament.edit.saliencies import PairSums
from lineament.edit.shifts import PatchMoments, worth_it
from lineament.load.data import load_data

_NUMBERS = 2**24  # of patches or maps held at once


@dataclass(frozen=True, eq=False, repr=False)
class LayerFidelity(Readable):
    """What one layer reads on data, and what each of its inputs gives to each output.

    Attributes:
        scores: saliency, singleton fidelity and energy of all (output, input) pairs.
        weight: [outputs, inputs, taps].
        moment: second moment of what the taps read, [inputs * taps, inputs * taps]; about the mean where ``centred``.
        mean: [inputs * taps]. places: positions (tokens) of a sample. samples: how many were read.
        centred: whether means were taken out, as for a layer before a batch norm.
    """

    scores: ComponentScores
    weight: Tensor
    moment: Tensor
    mean: Tensor
    places: float
    samples: int
    centred: bool

    def similarity(self, outputs: slice | list[int] = slice(None)) -> Tensor:
        """Q [outputs, inputs, inputs] of some outputs, for :func:`~lineament.edit.subset_fidelity` and its kin."""
        inputs, taps = self.weight.shape[1:]
        moment = self.moment.view(inputs, taps, inputs, taps)
        return (
            similarity_from_moments(moment, self.mean.view(inputs, taps), self.weight[outputs]) * self.places
        )

    def cholesky_energies(self, lam: float = 1e-4) -> Tensor:
        """Squared column norms of the Cholesky factor of Q + λI, [outputs, inputs]: what each input adds to those before it; depends on their order.

        The squared row norms, which the paper names for language models, are the energies plus λ.
        """
        Q = self.similarity()
        factor = torch.linalg.cholesky(Q + lam * torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device))
        return factor.square().sum(1)


def fidelity(
    model: nn.Module,
    data: Any,
    *,
    sites: str | Iterable[str] | None = None,
    center: bool | None = None,
    batch_size: int = 64,
) -> dict[str, LayerFidelity]:
    """Scores of every (output, input) pair of the layers of a network, in one pass of forwards in eval mode.

    Args:
        model: any module; it stays as it was.
        data: inputs (no labels needed): a tensor, batches, a ``Dataset``, a ``DataLoader``, a pair of inputs and labels, or a path.
        sites: names or globs of linear layers and convolutions without groups; all by default.
        center: take the mean of each contribution out; by default where a batch norm follows the layer.

    Raises:
        InputError: a site that is no such layer or never ran, no samples; NotFiniteError: NaN or infinite activations.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(net.weight)
    >>> found = fidelity(net, torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> found[""].scores.fidelity.tolist()
    [[0.1..., 0.9...]]
    """
    model = plain_network(model)
    layers = layers_of(model, sites)
    batches = Inputs(data, batch_size)
    centred = centred_layers(model, batches.first(model), layers, center)
    grams = moments(model, batches, layers)
    found = {}
    for name, gram in grams.items():
        weight = matrix(layers[name]).double()
        moment, mean = gram.moment(centred[name])
        found[name] = LayerFidelity(
            scored(weight, moment, gram.places),
            weight,
            moment,
            mean,
            gram.places,
            gram.samples,
            centred[name],
        )
    return found


def saliency(
    model: nn.Module,
    data: Any,
    *,
    sites: str | Iterable[str] | None = None,
    center: bool | None = None,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """E <Y_c, A_ci> of all pairs, [outputs, inputs] for each layer, without second moments: W times the gradient of E |Y|² / 2, for little more than two forwards.

    The arguments are those of :func:`fidelity`.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(net.weight)
    >>> saliency(net, torch.tensor([[1.0, 0.0], [0.0, 3.0]]))[""].tolist()
    [[0.5, 4.5]]
    """
    model = plain_network(model)
    layers = layers_of(model, sites)
    batches = Inputs(data, batch_size)
    centred = centred_layers(model, batches.first(model, 1), layers, center)
    sums = {name: PairSums(layer, centred[name]) for name, layer in layers.items()}
    total = sum(
        _forwards(
            model,
            batches,
            {
                **{f"{name}:in": each.enter for name, each in sums.items()},
                **{f"{name}:out": each.leave for name, each in sums.items()},
            },
        )
    )
    for name, each in sums.items():
        require(each.count > 0, f"sites: {name!r} never ran on the data")
    found = {name: each.saliency(total) for name, each in sums.items()}
    for name, pairs in found.items():
        if not bool(pairs.isfinite().all()):
            raise NotFiniteError(f"data: activations at {name!r} are not finite")
    return found


def scored(weight: Tensor, moment: Tensor, places: float = 1.0) -> ComponentScores:
    """Scores from weights [outputs, inputs, taps] and the second moment of what they read, without Q.

    >>> scored(torch.ones(1, 2, 1), torch.diag(torch.tensor([1.0, 3.0]))).fidelity.tolist()
    [[0.25, 0.75]]
    """
    inputs, taps = weight.shape[1:]
    row = (weight * (weight.flatten(1) @ moment).view_as(weight)).sum(2) * places
    own = moment.view(inputs, taps, inputs, taps).diagonal(dim1=0, dim2=2)  # [taps, taps, inputs]
    energy = torch.einsum("oit,tui,oiu->oi", weight, own, weight).clamp_min(0) * places
    alive, total = energy > 0, row.sum(1)
    some = total > energy.sum(1) * inputs * torch.finfo(weight.dtype).eps
    saliency = torch.where(alive, row, 0)
    safe, whole = torch.where(alive, energy, 1), torch.where(some, total, 1)[:, None]
    fidelity = torch.where(alive & some[:, None], row.square() / (safe * whole), 0)
    alpha = torch.where(alive, row / safe, 0)
    return ComponentScores(alpha, fidelity, saliency, energy, torch.where(some, total, 0))


class Inputs:
    """The inputs of data in any form, in batches, as often as they are asked for."""

    def __init__(self, data: Any, batch_size: int = 64):
        # Of a path or a data set a bounded number of samples.
        own: Any = load_data(data) if isinstance(data, (str, Path, Dataset)) else data
        batches = batches_of(own, name="data", batch_size=batch_size, once=True)
        self.batches: Any = list(batches) if isinstance(batches, Iterator) else batches
        first = next(iter(self.batches), None)
        require(first is not None, "data: it is empty; expected at least one sample")

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch[0] if isinstance(batch, (tuple, list)) else batch

    def first(self, model: nn.Module, rows: int = 2) -> Any:
        """A few inputs, where the model is."""
        batch = next(iter(self))
        few = (
            {key: value[:rows] for key, value in batch.items()}
            if isinstance(batch, Mapping)
            else batch[:rows]
        )
        few = ready(few, model)
        finite = not isinstance(few, Tensor) or not few.is_floating_point() or bool(few.isfinite().all())
        if not finite:
            raise NotFiniteError("data: it holds NaN or infinite values; leave those samples out")
        return few


def ready(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device and, where it holds real numbers, in its dtype."""
    batch = moved(batch, device_of(model))
    floating = isinstance(batch, Tensor) and batch.is_floating_point()
    return batch.to(dtype_of(model)) if floating else batch


def layers_of(model: nn.Module, sites: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The layers whose inputs can be scored: linear ones and convolutions over one or two axes without groups."""
    if sites is None:
        found = {name: module for name, module in model.named_modules() if reads(module)}
        require(bool(found), "model: it has no linear layer or convolution")
        return found
    found = {}
    for name, site in resolve(model, sites).items():
        require(
            reads(site.module),
            f"sites: {name!r} is a {type(site.module).__name__}, expected a linear layer or a convolution without groups"
            f"{suggest(name, [n for n, m in model.named_modules() if reads(m)])}",
        )
        found[name] = site.module
    return found


def centred_layers(
    model: nn.Module, example: Any, layers: Mapping[str, nn.Module], center: bool | None = None
) -> dict[str, bool]:
    """Whether the mean of each layer's contributions is taken out again, by a batch norm right after it."""
    if center is not None:
        return dict.fromkeys(layers, bool(center))
    normed = set(following_norms(model, example).values())
    return {name: name in normed for name in layers}


class Gram:
    """The second moment of what one layer's weights multiply, batch by batch."""

    def __init__(self, module: nn.Module):
        self.module, self.samples = module, 0
        self.stream: Covariance | PatchMoments = Covariance(correction=0)
        self._made: tuple[bool, Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        x, self._made = batched(self.module, x.detach()), None
        if self.stream.count == 0:
            self.stream = _shifted(self.module, x) or self.stream
        shifted = isinstance(self.stream, PatchMoments)
        taps = 1 if shifted else matrix(self.module).shape[2]
        for some in x.split(max(1, _NUMBERS // max(1, x[:1].numel() * taps))):
            if shifted:
                self.stream.update(some[:, :, None] if some.ndim == 3 else some)
            else:
                self.stream.update(patches(self.module, some))

    def moment(self, centred: bool) -> tuple[Tensor, Tensor]:
        """[columns, columns] and the mean [columns]; about the mean where ``centred``."""
        if self._made is None or self._made[0] != centred:
            mean, spread = self.stream.mean, self.stream.covariance
            self._made = centred, spread if centred else spread.addr_(mean, mean), mean
        return self._made[1:]

    @property
    def places(self) -> float:
        return self.stream.count / max(self.samples, 1)


def _shifted(module: nn.Module, x: Tensor) -> PatchMoments | None:
    """For a convolution that moves by one pixel, over maps on which distances of taps are fewer products than patches."""
    if isinstance(module, nn.Conv1d):
        x, module = x[:, :, None], widened(module)
    if not isinstance(module, nn.Conv2d) or set(module.stride) != {1}:
        return None
    padding, size = padding_of(module), (x.shape[2], x.shape[3])
    kernel, dilation = (
        (module.kernel_size[0], module.kernel_size[1]),
        (module.dilation[0], module.dilation[1]),
    )
    return PatchMoments(kernel, dilation, padding) if worth_it(kernel, dilation, padding, size) else None


def moments(model: nn.Module, batches: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, Gram]:
    """One pass of forwards that gathers the second moments of several layers.

    Raises:
        InputError: a layer that never ran; NotFiniteError: activations that are not finite.
    """
    grams = {name: Gram(module) for name, module in layers.items()}

    def seen(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            if not bool(torch.isfinite(x.detach().sum())):
                raise NotFiniteError(f"data: activations at {name!r} are not finite")
            grams[name].update(x)

        return see

    total = sum(_forwards(model, batches, {f"{name}:in": seen(name) for name in layers}))
    for name, gram in grams.items():
        require(gram.stream.count > 0, f"sites: {name!r} never ran on the data")
        gram.samples = total
    return grams


def _forwards(
    model: nn.Module, batches: Inputs, see: Mapping[str, Callable[[Tensor], None]]
) -> Iterator[int]:
    places = dict(zip(resolve(model, list(see)).values(), see.values(), strict=True))
    for batch in batches:
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(tap(model, places))
            called(model, ready(batch, model))
        yield rows_in(batch)
