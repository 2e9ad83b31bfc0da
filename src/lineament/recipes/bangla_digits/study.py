"""What the bangla-digits recipe measures: every descriptor with every classifier, and controls on the first data set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor, nn

from lineament.data.formats import read_npz
from lineament.handcrafted.hog import hog
from lineament.handcrafted.ink import ink
from lineament.handcrafted.table import classifier, described, evaluated
from lineament.recipes.kit.bangla import FILES, Held, bangla_digits, bangla_folder
from lineament.train.loop import fit

Array = np.ndarray
DESCRIPTORS = ("pixels", "hog", "hog-fine", "lbp", "gabor", "lbp-whole", "gabor-whole")


@dataclass(frozen=True)
class Result:
    """One pair on one seed."""

    descriptor: str
    classifier: str
    accuracy: float
    macro_f1: float
    seconds: float


@dataclass(frozen=True)
class Controls:
    """Accuracy by control, and how many test images are copies of training images."""

    accuracy: dict[str, float | None]
    copies: int
    best_hog: float
    permuted: float


def sets(config: Any) -> dict[str, Held]:
    """The data sets that are found; scikit-learn's digits where none is."""
    found: dict[str, Held] = {}
    for name in config.data_sets:
        held = bangla_digits(name, config.data_folder)
        if held is not None:
            found[name] = held
    if not found:
        x, y = (np.asarray(v) for v in load_digits(return_X_y=True))
        images = torch.from_numpy(x).reshape(-1, 8, 8).float() / 16
        found["digits"] = Held(
            "scikit-learn digits, as no Bangla digits were found", ink(images, crop=False).images, y, 0
        )
    return found


def split(held: Held, seed: int, train: int, test: int) -> tuple[Array, Array]:
    """Rows of a training and a test part, as large as asked for at most; the stored parts where there are some, else 80 and 20 %, by class."""
    rng = np.random.default_rng(seed)
    n = len(held.labels)
    if held.train:
        return rng.permutation(held.train)[:train], (held.train + rng.permutation(n - held.train))[:test]
    order = rng.permutation(n)
    order = order[np.argsort(_rank(held.labels[order]), kind="stable")]
    cut = min(test, n // 5)
    return order[cut : cut + train], order[:cut]


def _rank(labels: Array) -> Array:
    """How many of its class came before each."""
    seen: dict[int, int] = {}
    found = []
    for label in labels.tolist():
        seen[label] = seen.get(label, -1) + 1
        found.append(seen[label])
    return np.array(found)


def table(config: Any, held: Held, seed: int) -> list[Result]:
    """Every pair on one split."""
    train, test = split(held, seed, config.train, config.test)
    rows = np.concatenate([train, test])
    y = held.labels
    found = []
    for descriptor in DESCRIPTORS:
        X = described(descriptor, held.images[torch.from_numpy(rows)])
        for name in config.classifiers:
            made, grid = classifier(name, effort=config.effort, samples=len(train), seed=seed)
            entry, _ = evaluated(
                descriptor,
                name,
                made,
                grid,
                (X[: len(train)], y[train]),
                (X[len(train) :], y[test]),
                seed=seed,
            )
            found.append(
                Result(descriptor, name, entry.scores.accuracy, entry.scores.macro[2], entry.seconds)
            )
    return found


def controls(config: Any, held: dict[str, Held], first: str) -> Controls:
    """On the first data set: what else would give the figures of the table."""
    data = held[first]
    train, test = split(data, config.seeds[0], config.train, config.test)
    images, y, z = data.images, data.labels[train], data.labels[test]
    pick = lambda rows: images[torch.from_numpy(rows)]  # noqa: E731

    def svm(X: Array, Z: Array, labels: Array = y) -> float:
        return float((SVC(C=10.0).fit(X - X.mean(0), labels).predict(Z - X.mean(0)) == z).mean())

    whole = described("gabor", pick(np.concatenate([train, test])))
    gabor_train, gabor_test = whole[: len(train)], whole[len(train) :]
    accuracy: dict[str, float | None] = {"Gabor on a grid, SVM": svm(gabor_train, gabor_test)}
    rng = np.random.default_rng(0)
    random = _random_filters(pick(np.concatenate([train, test])), rng)
    accuracy["random filters of equal number and size, SVM"] = svm(random[: len(train)], random[len(train) :])
    permuted = svm(gabor_train, gabor_test, rng.permutation(y))
    accuracy["permuted labels"] = permuted
    known = {row.numpy().tobytes() for row in pick(train)}
    fresh = np.array([row.numpy().tobytes() not in known for row in pick(test)])
    model = SVC(C=10.0).fit(gabor_train, y)
    accuracy["without test images that are copies of training images"] = float(
        (model.predict(gabor_test)[fresh] == z[fresh]).mean()
    )
    # A HOG chosen on a part of the training part, and one chosen on the test part.
    inner = len(train) * 4 // 5
    scores: list[tuple[float, float]] = []
    for orientations in (8, 9, 12):
        for cell in (4, 5, 8):
            X, Z = (hog(pick(rows), orientations, cell).double().numpy() for rows in (train, test))
            for C in (1.0, 10.0, 100.0) if config.effort != "none" or len(train) <= 1000 else (10.0,):
                held_out = SVC(C=C).fit(X[:inner], y[:inner]).score(X[inner:], y[inner:])
                scores.append((float(held_out), float(SVC(C=C).fit(X, y).score(Z, z))))
    best = max(scores, key=lambda pair: pair[0])[1]
    accuracy["HOG tuned on the training part, SVM"] = best
    accuracy["HOG tuned on the test part (leakage), SVM"] = max(score for _, score in scores)
    accuracy["small CNN, the seconds of the Gabor SVM"] = _network(pick(train), y, pick(test), z, gabor_train)
    if "numtadb" in held:
        accuracy |= _numtadb(config)
    return Controls(accuracy, int((~fresh).sum()), best, permuted)


def _random_filters(images: Tensor, rng: np.random.Generator) -> Array:
    """Means and deviations on a grid of the responses to 18 random filters, made complex as Gabor's are."""
    filters = torch.from_numpy(rng.normal(size=(36, 1, 11, 11))).to(images)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
    found = []
    for part in images[:, None].split(256):
        response = nn.functional.conv2d(part, filters, padding=5).unflatten(1, (18, 2)).norm(dim=2)
        mean = nn.functional.adaptive_avg_pool2d(response, 4)
        square = nn.functional.adaptive_avg_pool2d(response.square(), 4)
        found.append(torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1).flatten(1))
    return torch.cat(found).double().numpy()


def _network(x: Tensor, y: Array, z_x: Tensor, z: Array, gabor: Array) -> float:
    """A small CNN for the seconds that the Gabor features' SVM takes (at least one epoch)."""
    start = time.perf_counter()
    described("gabor", x)
    SVC(C=10.0).fit(PCA(min(50, *gabor.shape)).fit_transform(gabor), y)
    seconds = time.perf_counter() - start
    torch.manual_seed(0)
    side = x.shape[-1] // 4
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * side * side, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    inputs, labels = x[:, None].float(), torch.from_numpy(y).long()
    begin = time.perf_counter()
    while True:
        fit(net, (inputs, labels), optimizer=optimizer, epochs=1)
        if time.perf_counter() - begin >= seconds:
            break
    with torch.no_grad():
        return float((net(z_x[:, None].float()).argmax(1).numpy() == z).mean())


def _numtadb(config: Any) -> dict[str, float | None]:
    """NumtaDB with its own scale and with 255, cropped and not: LBP and HOG with an SVM on 3,000 images."""
    place = bangla_folder(config.data_folder)
    if place is None:
        return {}
    z = read_npz(place / FILES["numtadb"], ("images", "labels"))
    count = min(config.train, 3000)
    x, y = torch.from_numpy(z["images"][: count + 1000]), z["labels"][: count + 1000]
    found: dict[str, float | None] = {}
    for label, images in (
        ("divided by 20, cropped", ink(x, white=20).images),
        ("divided by 20, not cropped", ink(x, white=20, crop=False).images),
        ("divided by 255, not cropped", ink(x, white=255, crop=False, polarity=False).images),
    ):
        X = described("hog", images)
        found[f"NumtaDB {label}: HOG, SVM"] = float(
            SVC(C=10.0).fit(X[:count], y[:count]).score(X[count:], y[count:])
        )
    return found
