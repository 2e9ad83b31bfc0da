"""What a baseline reads: class labels, and each descriptor of the samples, a network's site among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from lineament.core.checks import InputError, require, show, suggest
from lineament.data.samples import Samples
from lineament.handcrafted.table import DESCRIPTORS, described
from lineament.learn.boosting.network import SiteFeatures
from lineament.load.models import load_model

if TYPE_CHECKING:
    from lineament.audit.baseline import BaselineOptions


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
        f"targets: class {rare[:1].tolist()} has a single sample among those read, expected at least 2 (one to train, one to test)",
    )
    return y


def is_images(held: Samples) -> bool:
    shape = held.inputs.shape[1:]
    return len(shape) in (2, 3) and min(shape[-2:]) >= 8


def check_feature(name: str, images: bool) -> None:
    if ":" in name:
        return
    known = DESCRIPTORS if images else ("columns",)
    if name not in known:
        what = ""
        if images and name == "columns":
            what = " is for data that are no images, and these are images (their plain values are 'pixels'),"
        elif name in DESCRIPTORS:
            what = " is for images of 8 pixels a side or more, which these data are not,"
        raise InputError(
            f"features: got {name!r}, which{what or ' is not a choice'}{suggest(name, known)}; MODEL:SITE is a network's site"
        )


def feature_rows(name: str, held: Samples, options: BaselineOptions) -> np.ndarray:
    if name == "columns":
        return held.inputs.flatten(1).double().numpy()
    if ":" not in name:
        return described(name, held.inputs, prepare=options.ink)
    model, site = _model_and_site(name)
    loaded = load_model(model)
    inputs = held.inputs
    if not inputs.is_floating_point() and inputs.ndim == 4:
        inputs = inputs.float() / 255
    if loaded.mean:
        shape = (1, -1, 1, 1)
        inputs = (inputs - torch.tensor(loaded.mean).view(shape)) / torch.tensor(loaded.std).view(shape)
    return SiteFeatures(loaded.model, site).fit(inputs).transform(inputs)


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
    train, test = train_test_split(np.arange(len(y)), test_size=size, random_state=seed, stratify=y)
    return np.sort(train), np.sort(test)
