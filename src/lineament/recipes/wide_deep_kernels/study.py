"""What the recipe measures: Dirichlet pairs with every rule, limits of named activations, and digits in few dimensions."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import dirichlet
from sklearn.datasets import make_friedman1
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from lineament.data.digits import digit_images
from lineament.kernels.classifiers import InfiniteClassifier, InfiniteRegressor
from lineament.kernels.recursion import log_ntk
from lineament.kernels.regimes import optimal_dual
from lineament.kernels.scores import hilbert_scores, laplace_scores, nearest
from lineament.kernels.table import LogTable

Array = np.ndarray
# Dirichlet parameters of the two classes by the sphere's dimension, class 0 (40 %) and class 1 (60 %), as released.
PAIRS = {
    1: ((1, 2), (2, 1)),
    2: ((0.5, 0.5, 2.5), (2.5, 0.1, 0.5)),
    4: ((3, 1, 2, 1, 1), (1, 2, 2, 2, 3)),
    8: ((1, 2, 1, 2, 1, 1, 1, 1, 1), (1, 1, 1, 2, 3, 4, 2, 2, 1)),
}


@dataclass(frozen=True)
class Pair:
    """Accuracy of each rule, and how often the matching ψ and the Hilbert rule say the same."""

    accuracy: dict[str, float]
    agrees_with_hilbert: float


@dataclass(frozen=True)
class Limits:
    """Slopes of ln ψ against ln distance by dimension; relu's NTK ratio by depth; regression errors by depth; shares of points at which limits and rules agree."""

    slopes: dict[str, float]
    relu: dict[str, float]
    regression: dict[str, float]
    square_is_nearest: float
    mixture_is_majority: float
    float32_off: float


@dataclass(frozen=True)
class Digits:
    """Digits in some principal components: estimates of their dimension, what leave-one-out chose, accuracy of it, of 1-NN and by dimension."""

    data: str
    components: int
    two_nn: float
    likelihood: float
    chosen: float
    accuracy: float
    nearest: float


def drawn(dimension: int, count: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Unit rows, their labels, and what the Bayes rule says of them."""
    first, second = PAIRS[dimension]
    y = (rng.random(count) < 0.6).astype(int)
    p = np.where(y[:, None] == 1, rng.dirichlet(second, count), rng.dirichlet(first, count))
    p = np.clip(p, 1e-12, None)
    p /= p.sum(1, keepdims=True)
    bayes = (0.6 * dirichlet.pdf(p.T, second) > 0.4 * dirichlet.pdf(p.T, first)).astype(int)
    return p / np.linalg.norm(p, axis=1, keepdims=True), y, bayes


def pair(dimension: int, count: int, seed: int, tests: int) -> Pair:
    """Every rule on one draw."""
    rng = np.random.default_rng([1717, dimension, count, seed])
    X, y, _ = drawn(dimension, count, rng)
    Z, z, bayes = drawn(dimension, tests, rng)
    said: dict[str, Array] = {"Bayes": bayes, "1-NN": nearest(X, y, Z)}
    said["Hilbert"] = (hilbert_scores(X, 2.0 * y - 1, Z, dimension) > 0).astype(int)
    some = min(count, 8000)  # as many as one dense matrix is made of
    said["Laplace kernel"] = (laplace_scores(X[:some], 2.0 * y[:some] - 1, Z) > 0).astype(int)
    said["majority"] = np.full(tests, int(y.mean() > 0.5))
    for d in PAIRS:
        said[f"psi {d}"] = InfiniteClassifier(dimension=d, sphere=None).fit(X, y).predict(Z)
    few = min(count, 2000)
    said["k-NN, k tuned"] = (
        GridSearchCV(
            KNeighborsClassifier(), {"n_neighbors": [5, 15, 41, 101] if count >= 500 else [3, 9, 21]}, cv=3
        )
        .fit(X, y)
        .predict(Z)
    )
    said[f"RBF SVM, {few:,} points" if few < count else "RBF SVM"] = SVC().fit(X[:few], y[:few]).predict(Z)
    wide = MLPClassifier((4096,), max_iter=60, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        said["MLP of width 4096"] = np.asarray(wide.fit(X[:few], y[:few]).predict(Z))
    permuted = rng.permutation(y)
    said["permuted labels"] = InfiniteClassifier(dimension=dimension, sphere=None).fit(X, permuted).predict(Z)
    accuracy = {
        name.partition(",")[0] if name.startswith("RBF") else name: float((v == z).mean())
        for name, v in said.items()
    }
    return Pair(accuracy, float((said[f"psi {dimension}"] == said["Hilbert"]).mean()))


def limits(seed: int) -> Limits:
    """Closed forms and rules against what the kernels give."""
    slopes = {}
    for d in (1, 2, 3, 4, 5, 8):
        distance = np.geomspace(1e-5, 1e-2, 40)
        slopes[str(d)] = float(np.polyfit(np.log(distance), LogTable(optimal_dual(d))(distance**2 / 2), 1)[0])
    relu = {str(L): float(np.exp(log_ntk("relu", L, xi=0.0))) / (L + 1) for L in (10, 100, 1000)}
    X, y = make_friedman1(600, noise=1.0, random_state=seed)
    regression = {}
    for depth in (1, 4, 16):
        net = InfiniteRegressor("erf", depth, "nngp", ridge=1e-3).fit(X[:400], y[:400] - y[:400].mean())
        regression[str(depth)] = float(
            np.sqrt(np.mean((net.predict(X[400:]) + y[:400].mean() - y[400:]) ** 2))
        )
    rng = np.random.default_rng(seed)
    A, a, _ = drawn(2, 500, rng)
    B, _, _ = drawn(2, 500, rng)
    # A square far down: distances to the nearest two are told apart at depth 40.
    square = InfiniteClassifier("square", sphere=None).fit(A, a).predict(B)
    mixture = InfiniteClassifier("relu", sphere=None).fit(A, a).predict(B)
    exact = LogTable(optimal_dual(8), 20)
    delta = np.square(B[:, None] - A[None]).sum(2) / 2
    single = 1 - (B.astype(np.float32) @ A.astype(np.float32).T).astype(float)
    gap = np.abs(exact(np.clip(delta, 1e-30, 1)) - exact(np.clip(single, 1e-30, 1)))
    return Limits(
        slopes, relu, regression, float((square == nearest(A, a, B)).mean()), float((mixture == int(a.mean() > 0.5)).mean()),
        float(gap.max()),
    )  # fmt: skip


def digits(config: Any) -> list[Digits]:
    """MNIST where it is found, else scikit-learn's digits; of each number of principal components."""
    found = []
    held = digit_images("auto", "train", count=config.digits, data_folder=config.data_folder)
    x, y = held.inputs.flatten(1).double().numpy(), held.targets.numpy()
    half = len(x) * 2 // 3
    for components in config.principal:
        X = PCA(components, random_state=0).fit_transform(x)
        net = InfiniteClassifier().fit(X[:half], y[:half])
        one = KNeighborsClassifier(1).fit(X[:half], y[:half])
        estimate: Any = net.estimate_
        found.append(
            Digits(
                held.source, components, estimate.two_nn, estimate.maximum_likelihood, float(net.dimension_ or math.nan),
                float(net.score(X[half:], y[half:])), float(one.score(X[half:], y[half:])),
            )
        )  # fmt: skip
    return found
