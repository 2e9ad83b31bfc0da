"""What a baseline reads: class labels, and each descriptor of the samples, a network's site among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show, suggest
from lineament.data.samples import Samples
from lineament.handcrafted.table import DESCRIPTORS, described
from lineament.learn.boosting.network import SiteFeatures
from lineament.load.image_sizes import brought_to
from lineament.load.input_layout import find_layout
from lineament.load.models import load_model
from lineament.load.weights import digest

if TYPE_CHECKING:
    from lineament.audit.baseline import BaselineOptions

# Grey, colour, and colour with transparency.
_CHANNELS = (1, 3, 4)


def _called(held: Samples, rare: np.ndarray) -> str:
    """The first of these classes as the data call it."""
    number = int(rare[0]) if len(rare) else 0
    return repr(held.classes[number]) if 0 <= number < len(held.classes) else str(number)


def class_labels(held: Samples) -> np.ndarray:
    targets = held.targets
    require(
        targets.ndim == 1 and not targets.is_floating_point(),
        f"targets: got {show(targets)}, expected one class label a sample; a baseline is for classification",
    )
    y = targets.numpy()
    known, counts = np.unique(y, return_counts=True)
    require(len(known) > 1, f"targets: one class only ({known.tolist()}), expected two or more")
    rare = known[counts < 2]
    require(
        not len(rare),
        f"targets: class {_called(held, rare)} has a single sample among those read, expected at least 2 (one to train, one to test)",
    )
    return y


def channels_first(held: Samples) -> Samples:
    """Images whose channels are stored last, [n, height, width, channels], as [n, channels, height, width], which is said."""
    shape = tuple(held.inputs.shape[1:])
    if len(shape) != 3 or shape[-1] not in _CHANNELS or shape[0] in _CHANNELS or min(shape[:2]) < 8:
        return held
    told = f"inputs of {' x '.join(map(str, shape))} are images whose channels come last"
    return replace(held, inputs=held.inputs.movedim(-1, 1).contiguous(), notes=(*held.notes, told))


def is_images(held: Samples) -> bool:
    shape = held.inputs.shape[1:]
    return len(shape) in (2, 3) and min(shape[-2:]) >= 8


def check_feature(name: str, held: Samples) -> None:
    """Whether a descriptor of that name can be computed of these samples; a network's site is looked at where it is loaded."""
    if ":" in name:
        return
    images = is_images(held)
    known = DESCRIPTORS if images else ("columns",)
    if name not in known:
        what = " is not a choice"
        if images and name == "columns":
            what = " is for data that are no images, and these are images (their plain values are 'pixels')"
        elif name in DESCRIPTORS:
            shape = list(held.inputs.shape[1:])
            what = f" is for images of 8 pixels a side or more, and a sample here has shape {shape}"
        raise InputError(
            f"features: got {name!r}, which{what}{suggest(name, known)}; MODEL:SITE is a network's site"
        )


class SiteRows:
    """The rows of features at ``MODEL:SITE`` for samples as they are stored.

    Which form of a sample the network takes (channels, scale, flat or not) is found on the first two, as for an audit, and said in ``note``; where it tells the
    size of its images (``config.image_size``) and takes no other, they are brought to it.

    Raises:
        InputError: a model that cannot be loaded, a site it does not have, samples that it takes in no form.
    """

    def __init__(self, name: str, held: Samples):
        model, site = _model_and_site(name)
        loaded = load_model(model)
        self.reader = _Site(loaded.model, site)
        self.size: tuple[int, int] | None = None
        given = (loaded.mean, loaded.std, loaded.batch or 2)
        try:
            self.layout, said = find_layout(self.reader, held, *given)
        except InputError:
            side = getattr(getattr(loaded.model, "config", None), "image_size", None)
            if (
                not is_images(held)
                or not isinstance(side, int)
                or tuple(held.inputs.shape[-2:]) == (side, side)
            ):
                raise
            self.size = (side, side)
            self.layout, said = find_layout(self.reader, brought_to(held, self.size), *given)
            said = f"{said}; images are brought to the {side} x {side} pixels that it expects"
        self.note = f"{name}: {said}"

    @property
    def digest(self) -> str:
        """Of the network's weights and code."""
        return digest(self.reader.model)

    def rows(self, held: Samples) -> np.ndarray:
        """[n, units], float64."""
        if self.size is not None:
            held = brought_to(held, self.size)
        return self.reader.site.transform(self.layout.apply(held.inputs))


class _Site(nn.Module):
    """A network up to a site, whose features are its outputs."""

    def __init__(self, model: nn.Module, site: str):
        super().__init__()
        self.model = model
        self.site = SiteFeatures(model, site)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.site.transform(x))


def feature_rows(
    name: str, held: Samples, options: BaselineOptions, networks: Mapping[str, SiteRows]
) -> np.ndarray:
    if name in networks:
        return networks[name].rows(held)
    if name == "columns":
        return held.inputs.flatten(1).double().numpy()
    return described(name, held.inputs, prepare=options.ink)


def _model_and_site(name: str) -> tuple[str, str]:
    """``net.py:make:layer4`` is the model ``net.py:make`` and the site ``layer4``; sites may end in ``:in``."""
    words = name.split(":")
    tail = 2 if words[-1] in ("in", "out") else 1
    model, site = ":".join(words[:-tail]), ":".join(words[-tail:])
    require(
        bool(model) and bool(site), f"features: got {name!r}, expected MODEL:SITE, such as net.py:make:layer4"
    )
    return model, site


def stratified_split(y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    classes = len(np.unique(y))
    size = max(classes, round(share * len(y)))
    require(
        len(y) - size >= classes,
        f"test: got {share:g}, which leaves {max(len(y) - size, 0)} of {len(y)} samples to train on, expected one of each of {classes} classes or more",
    )
    train, test = train_test_split(np.arange(len(y)), test_size=size, random_state=seed, stratify=y)
    return np.sort(train), np.sort(test)
