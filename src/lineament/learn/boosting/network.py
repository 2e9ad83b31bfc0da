"""Boosting on the features of a network: a site as a scikit-learn transformer, and a head grown on what a trained network computes.

Emami, Martínez-Muñoz, arXiv 1909.12098, section 1.4: the features stay as they are, and the last dense layers are grown unit by unit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor, nn

from lineament.core.checks import InputError, number, require, show, suggest
from lineament.core.estimator_data import validated
from lineament.core.loaders import batches_of
from lineament.core.models import called, device_of, dtype_of, frozen, logits, moved
from lineament.core.sites.activations import capture
from lineament.learn.boosting.estimators import GBNNClassifier


class SiteFeatures(TransformerMixin, BaseEstimator):
    """What passes at a site of a network, as rows of features; nothing is trained.

    Args:
        model: any module. site: as everywhere, such as ``"layer4"`` or ``"fc:in"``.
        pool: ``"mean"`` averages maps over their positions; ``"flatten"`` keeps them.
        input_shape: of one sample, where rows are flat. batch_size: samples at a time.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> SiteFeatures(model, "1").fit_transform(np.zeros((5, 4))).shape
    (5, 3)
    """

    def __init__(
        self,
        model: Any,
        site: str,
        *,
        pool: str = "mean",
        input_shape: Any = None,
        batch_size: int = 256,
    ):
        self.model = model
        self.site = site
        self.pool = pool
        self.input_shape = input_shape
        self.batch_size = batch_size

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags

    def fit(self, X: Any, y: Any = None) -> SiteFeatures:
        """Nothing is learned; the width of the features is counted on one sample.

        Args:
            X: [n, ...], a tensor as it is, or what scikit-learn takes for an array; whole numbers stay so where the network has an embedding, as tokens.
        """
        self.n_features_out_ = self._features(self._inputs(X, reset=True)[:1]).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features [n, units], float64."""
        return self._features(self._inputs(X, reset=False))

    def _inputs(self, X: Any, *, reset: bool) -> Tensor:
        if not isinstance(X, Tensor):
            X = validated(self, X, reset=reset, dtype="numeric", allow_nd=True)
            X = torch.from_numpy(np.require(X, requirements=["C", "W"]))
            if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in self.model.modules()):
                X = X.to(dtype_of(self.model))
        inputs = X.to(device_of(self.model))
        if inputs.is_floating_point():
            inputs = inputs.to(dtype_of(self.model))
        return inputs if self.input_shape is None else inputs.reshape(len(inputs), *self.input_shape)

    def _features(self, inputs: Tensor) -> np.ndarray:
        number("batch_size", self.batch_size, low=1, integer=True)
        require(
            self.pool in ("mean", "flatten"), f"pool: got {show(self.pool)}, expected 'mean' or 'flatten'"
        )
        found = []
        with frozen(self.model), torch.no_grad():
            for part in inputs.split(self.batch_size):
                found.append(_passed(self.model, self.site, part, self.pool))
        return torch.cat(found).double().cpu().numpy()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``site_0``, ``site_1``, ..."""
        return np.array([f"{self.site}_{unit}" for unit in range(self.n_features_out_)], dtype=object)


def _passed(model: nn.Module, site: str, inputs: Any, pool: str) -> Tensor:
    with capture(model, [site], stop_early=True) as acts:
        called(model, inputs)
    x = acts[site]
    if pool == "mean" and x.ndim > 2:
        # Maps are (batch, channel, ...), sequences (batch, position, unit).
        return x.mean(1) if x.ndim == 3 else x.flatten(2).mean(2)
    return x.flatten(1)


def boosted_head(
    model: nn.Module,
    data: Iterable[tuple[Any, Tensor]] | tuple[Tensor, Tensor],
    *,
    site: str | None = None,
    head: GBNNClassifier | None = None,
    units: int | None = None,
) -> nn.Module:
    """A copy of a network whose last layers are a head grown by boosting on its own features.

    Args:
        model: a classifier; it is left as it is.
        data: batches (inputs, labels), such as a ``DataLoader``, or one pair.
        site: the linear layer that the head takes the place of; the last one by default. Layers after it in the same ``nn.Sequential`` go, too.
        head: the estimator to be fitted, :class:`~lineament.learn.boosting.estimators.GBNNClassifier` by default.
        units: of the head that are used, the first ones; all by default.

    Returns:
        The copy; its outputs are logits of the sorted labels (of two labels: one logit of the larger beside zero).

    Raises:
        InputError: no such linear layer, its inputs are not one row a sample, or layers after it are left.

    >>> torch.manual_seed(0); model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    <torch._C.Generator object at ...>
    >>> x = torch.randn(60, 4); new = boosted_head(model, (x, x[:, :3].argmax(1)), head=GBNNClassifier(12, 3, random_state=0))
    >>> bool((new(x).argmax(1) == x[:, :3].argmax(1)).float().mean() > 0.6), type(new[2]).__name__
    (True, 'Sequential')
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    require(bool(linear), "model: it has no linear layer whose place a head could take")
    name = linear[-1] if site is None else site.removesuffix(":in")
    if name not in linear:
        raise InputError(f"site: {site!r} is no linear layer of the model{suggest(name, linear)}")
    batches = batches_of(data, name="data", once=True)
    features, labels = [], []
    with frozen(model), torch.no_grad():
        for inputs, targets in batches:
            given = moved(inputs, device_of(model))
            features.append(_passed(model, f"{name}:in", given, "flatten").double().cpu().numpy())
            labels.append(torch.as_tensor(targets).cpu().numpy())
            width = features[-1].shape[1]
            require(
                width == model.get_submodule(name).in_features,
                f"site: {name!r} takes {model.get_submodule(name).in_features} numbers at several positions of a sample, expected one row a sample",
            )
    require(bool(features), "data: it has no batches")
    X, y = np.concatenate(features), np.concatenate(labels)
    grown = (GBNNClassifier(random_state=0) if head is None else head).fit(X, y)
    made = copy.deepcopy(model)
    plain: nn.Module = grown.to_torch(units).to(device=device_of(model), dtype=dtype_of(model))
    if len(grown.classes_) == 2:
        plain.append(_Beside())  # pyright: ignore
    plain.train(model.get_submodule(name).training)
    parent, _, last = name.rpartition(".")
    place = made.get_submodule(parent)
    if isinstance(place, nn.Sequential):
        at = list(place._modules).index(last)
        for later in list(place._modules)[at + 1 :]:
            place._modules[later] = nn.Identity()
    setattr(place, last, plain) if name else None
    with frozen(made), torch.no_grad():
        answer = logits(called(made, given))
        wanted = plain(torch.from_numpy(features[-1]).to(answer))
    require(
        answer.shape == wanted.shape and bool(torch.allclose(answer, wanted, rtol=1e-3, atol=1e-4)),
        f"site: the model changes what {name!r} computes before it answers; expected its last linear layer ({linear[-1]!r})",
    )
    return made


class _Beside(nn.Module):
    """One logit as two: zero beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x], 1)
