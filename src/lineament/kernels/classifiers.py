"""Infinitely wide networks of any depth, and of infinite depth, as scikit-learn estimators.

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126, sections 1.2 and 2. At infinite depth nothing is solved: after division the kernel matrix tends to the
identity, and the classifier to nearest neighbour, majority, or Σ y_i ψ(⟨x_i, x⟩) with a singular ψ, by the activation's dual at 0 and its slopes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.estimator_data import validated
from lineament.core.estimator_files import SavedEstimator
from lineament.kernels.dimension import intrinsic_dimension
from lineament.kernels.duals import Dual, dual_of
from lineament.kernels.regimes import optimal_dual, regime
from lineament.kernels.sphere import SphereMap
from lineament.kernels.table import COINCIDENT, LogTable, ValueTable, optimal_table
from lineament.kernels.tiles import Preconditioner, Rows, Tiles, bytes_of, conjugate_gradients, product

Array = np.ndarray
# Rows whose own label the leave-one-out choice predicts.
_LEFT_OUT = 2000
# Of the kernel matrix, at most, in a preconditioner.
_COLUMNS = 1024


class _Infinite(SavedEstimator, BaseEstimator):
    """What classifier and regressor share: the map to the sphere, merged duplicates, and the solution at finite depth."""

    activation: Any
    depth: float
    kernel: str
    sphere: Any
    ridge: float
    memory: Any
    n_features_in_: int

    def _prepared(self, X: Array, y: Array) -> tuple[Rows, Array, Array]:
        """Different unit rows, the mean target of each, and how many samples each stands for."""
        self.sphere_ = SphereMap.fitted(self.sphere, X)
        mapped = self.sphere_(X)
        _, first, which, counts = np.unique(
            mapped.round(12), axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        # In the order of the samples, which a user may read.
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        means = np.zeros((len(first), y.shape[1]))
        np.add.at(means, place[which.ravel()], y)
        counts = counts[order]
        self.duplicates_ = len(X) - len(first)
        self.notes_: tuple[str, ...] = ()
        if self.duplicates_:
            self.notes_ += (
                f"{self.duplicates_} of {len(X)} samples are equal to others and count with them",
            )
        if self.sphere in ("normalize", None) and (mapped.min(0) < 0).any():
            few = mapped[np.sort(first)][:2000]
            opposite = float((few @ few.T < 0).mean())
            if opposite:
                self.notes_ += (
                    f"{100 * opposite:.2g} % of the pairs have negative cosines, which count as 0; sphere='cap' has none",
                )
        return Rows(mapped[first[order]]), means / counts[:, None], counts

    def _solve(self, dual: Dual, rows: Rows, y: Array) -> None:
        """Weights y' (K + ridge)⁻¹ at finite depth, and how well they solve it."""
        n = len(rows)
        require(
            self.ridge > 0 or dual.b >= 1 - 1e-9,
            f"ridge: {dual.name} has φ̂'(1) = {dual.b:.3g} < 1, so that depth makes all points alike; expected a ridge above 0, such as 1e-3",
        )
        self.table_ = LogTable(dual, self.depth, self.kernel)  # pyright: ignore
        self.values_ = ValueTable(self.table_)
        memory = bytes_of(self.memory)
        if 16 * n * n <= memory:
            matrix = np.empty((n, n))

            def filled(down: slice, tiles: Tiles) -> None:
                for across, tile in tiles:
                    matrix[down, across] = np.exp(self.table_(np.clip(tile, 0, 1)) - self.table_.at_one)

            rows.strips(rows, filled)
            matrix.flat[:: n + 1] = 1 + self.ridge
            try:
                weights = cho_solve(cho_factor(matrix, lower=True), y)
            except LinAlgError as error:
                raise InputError(self._singular(n)) from error
            left, self.passes_ = np.linalg.norm(matrix @ weights - y, axis=0), 0
            self.residual_ = float((left / np.maximum(np.linalg.norm(y, axis=0), 1e-300)).max())
        else:
            tiles = 8 * (8 * n * y.shape[1] + 3 * rows.left.size + (1 << 20))
            require(
                tiles <= memory,
                f"memory: {n:,} points need {tiles / 1e9:.2g} GB even tile by tile, got {show(self.memory)}; expected more, or fewer points",
            )
            # Columns of the preconditioner take two arrays, and a small share of a pass.
            columns = min(_COLUMNS, n // 8, (memory - tiles) // (24 * n))
            weights, left, self.passes_ = conjugate_gradients(
                lambda p: product(self.values_, rows, rows, p, self.ridge),
                y,
                nearly=self._nearly(rows, columns) if columns >= 8 else None,
            )
            self.residual_ = float(left.max())
        require(self.residual_ < 1e-4, self._singular(n, self.residual_))
        self.weights_ = weights

    def _nearly(self, rows: Rows, count: int) -> Preconditioner:
        """A preconditioner from so many columns of the kernel matrix."""
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:count])
        columns = np.empty((len(rows), count))

        def filled(down: slice, tiles: Tiles) -> None:
            for across, tile in tiles:
                columns[down, across] = self.values_(tile)

        rows.strips(Rows(rows.X[chosen]), filled)
        columns[chosen, np.arange(count)] = 1.0
        return Preconditioner(columns, chosen, self.ridge)

    def _singular(self, n: int, residual: float | None = None) -> str:
        left = "" if residual is None else f", which leaves {residual:.1g} of the targets unexplained"
        return (
            f"ridge: the kernel matrix of {n:,} points is nearly singular at depth {self.depth}{left}; "
            f"expected a ridge above {self.ridge:g}, such as {max(10 * self.ridge, 1e-8):g}, or more depth"
        )

    def _learned(self) -> tuple[dict[str, Array], dict[str, Any]]:
        check_is_fitted(self)
        names = [name for name in ("ballot_", "weights_") if hasattr(self, name)]
        arrays = {"rows": self.rows_.X, "centre": self.sphere_.centre} | {n: getattr(self, n) for n in names}
        told = {
            "scale": self.sphere_.scale,
            "features": self.n_features_in_,
            "dimension": getattr(self, "dimension_", None),
            "classes": getattr(self, "classes_", np.zeros(0)).tolist(),
            "flat": getattr(self, "_flat", True),
        }
        return arrays, told

    def _relearned(self, arrays: dict[str, Array], told: dict[str, Any]) -> None:
        self.rows_ = Rows(arrays["rows"])
        self.sphere_ = SphereMap(self.sphere, arrays["centre"], float(told["scale"]))
        self.n_features_in_, self._flat = int(told["features"]), bool(told["flat"])
        self.dimension_ = told["dimension"]
        for name in ("ballot_", "weights_"):
            if name in arrays:
                setattr(self, name, arrays[name])
        if told["classes"]:
            self.classes_ = np.array(told["classes"])
        dual = dual_of(self.activation) if self.dimension_ is None else optimal_dual(self.dimension_)
        self.limit_ = regime(dual)
        if self.depth != math.inf or self.limit_.limit == "singular kernel":
            self.table_ = LogTable(dual, self.depth, self.kernel)  # pyright: ignore
            self.values_ = ValueTable(self.table_)

    def _mapped(self, X: Any) -> Rows:
        check_is_fitted(self)
        X = validated(self, X, reset=False, dtype=np.float64)
        return Rows(self.sphere_(X))

    def beyond(self, X: Any) -> int:
        """How many rows lie outside the cap of the training rows (``sphere="cap"``), and are moved to its edge."""
        check_is_fitted(self)
        checked: Any = validated(self, X, reset=False, dtype=np.float64)
        return self.sphere_.beyond(checked)


class InfiniteClassifier(ClassifierMixin, _Infinite):
    """An infinitely wide network, of finite or infinite depth.

    Args:
        activation: ``"optimal"`` is consistent on a manifold of ``dimension`` dimensions; or what :func:`~lineament.kernels.dual_of` takes.
        depth: layers; infinity is the limit, in which nothing is solved.
        kernel: ``"nngp"`` or ``"ntk"``, which have the same infinite limit.
        dimension: of the manifold (of ``"optimal"``); ``"auto"`` estimates it and lets the leave-one-out accuracy choose among its neighbours.
        sphere: ``"cap"``, ``"split"``, ``"normalize"`` or ``None``, see :class:`~lineament.kernels.sphere.SphereMap`.
        ridge: added to the diagonal, in units of K(1); it cancels at infinite depth.
        memory: a finite depth is solved exactly where two kernel matrices fit, else by conjugate gradients with tiles.

    A training point has its own label; of equal points with several labels, the most frequent one. Ties go to the first class. Classes are not balanced:
    a frequent class has more votes. Features should be on one scale (``StandardScaler``).

    Attributes:
        limit_: the :class:`~lineament.kernels.regimes.Regime`; dimension_: what was chosen; estimate_: the two estimates of it; left_out_: leave-one-out
            accuracy by dimension; duplicates_: samples merged with others; notes_: what should be known of the data;
            residual_: of the solution, as a share of the targets; passes_: over the tiles.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> net = InfiniteClassifier().fit(X[::2], y[::2])
    >>> bool(net.score(X[1::2], y[1::2]) > 0.9), net.limit_.limit
    (True, 'singular kernel')
    """

    def __init__(
        self,
        activation: Any = "optimal",
        depth: float = math.inf,
        kernel: str = "nngp",
        *,
        dimension: Any = "auto",
        sphere: Any = "cap",
        ridge: float = 0.0,
        memory: Any = "1GB",
    ):
        self.activation = activation
        self.depth = depth
        self.kernel = kernel
        self.dimension = dimension
        self.sphere = sphere
        self.ridge = ridge
        self.memory = memory

    def fit(self, X: Any, y: Any) -> InfiniteClassifier:
        """Learn from X [n, features] and class labels y [n]."""
        _check(self)
        auto = isinstance(self.dimension, str)
        if auto:
            one_of("dimension", self.dimension, ("auto",))
        else:
            number("dimension", self.dimension, low=1)
        X, y = validated(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        require(len(self.classes_) > 1, f"y: one class only ({self.classes_.tolist()}), expected two or more")
        rows, votes, counts = self._prepared(X, np.eye(len(self.classes_))[index])
        # Of equal points with several labels the most frequent.
        labels = votes.argmax(1)
        self.contradictions_ = int((votes.max(1) < 1).sum())
        if self.contradictions_:
            self.notes_ += (
                f"{self.contradictions_} points have contradictory labels: the most frequent one counts",
            )
        ballot = np.eye(len(self.classes_))[labels] * counts[:, None]
        self.estimate_, self.left_out_, self.dimension_ = None, {}, None
        optimal = isinstance(self.activation, str) and self.activation == "optimal"
        if optimal:
            self.dimension_ = self._dimension(rows, ballot, labels) if auto else self.dimension
        dual = optimal_dual(self.dimension_) if optimal else dual_of(self.activation)  # pyright: ignore
        self.limit_ = regime(dual)
        self.rows_, self.ballot_ = rows, ballot
        if self.depth != math.inf:
            self._solve(dual, rows, np.eye(len(self.classes_))[labels])
            return self
        require(
            self.limit_.limit != "linear",
            f"activation: {dual.name} is linear at every depth and has no infinite limit; expected a finite depth, or another activation",
        )
        require(
            not self.limit_.needs_ridge or self.ridge > 0,
            f"ridge: {dual.name} has φ̂'(1) = {dual.b:.3g} < 1, so that all points become alike; expected a ridge above 0",
        )
        if self.limit_.limit == "singular kernel":
            self.values_ = (
                optimal_table(self.dimension_) if optimal else ValueTable(LogTable(dual))  # pyright: ignore
            )
        return self

    def _dimension(self, rows: Rows, ballot: Array, labels: Array) -> float:
        """The dimension near the estimate whose ψ predicts most labels when each point's own term is left out; one pass for all of them."""
        if len(rows) < 4:
            return 2.0
        self.estimate_ = intrinsic_dimension(rows.X)
        likely = self.estimate_.both
        middle = min(max(round(likely), 1), 60)
        candidates = [float(d) for d in range(max(1, middle - 2), middle + 3)]
        tables = [optimal_table(d) for d in candidates]
        asked = np.sort(np.random.default_rng(0).permutation(len(rows))[:_LEFT_OUT])
        scores = np.zeros((len(candidates), len(asked), ballot.shape[1]))

        def judged(down: slice, tiles: Tiles) -> None:
            own = asked[down]
            scores[:, down] = 0.0
            for across, tile in tiles:
                mine = np.flatnonzero((own >= across.start) & (own < across.stop))
                for table, score in zip(tables, scores):
                    values = table(tile)
                    values[mine, own[mine] - across.start] = 0.0
                    score[down] += values @ ballot[across]

        Rows(rows.X[asked]).strips(rows, judged)
        right = (scores.argmax(2) == labels[asked]).mean(1)
        self.left_out_ = {d: float(r) for d, r in zip(candidates, right)}
        return max(candidates, key=lambda d: (self.left_out_[d], -abs(d - likely)))

    def _scores(self, X: Any) -> tuple[Array, Array]:
        """Scores of each class, and the logarithm of what multiplies them, [n, classes] and [n]."""
        rows = self._mapped(X)
        if self.depth != math.inf:
            return _deep(self.table_, rows, self.rows_, self.weights_)
        if self.limit_.limit == "singular kernel":
            found = product(self.values_, rows, self.rows_, self.ballot_)
            return found, np.full(len(rows), self.values_.log_scale)
        near = self.limit_.limit == "nearest neighbour"
        share = self.ballot_.sum(0) / self.ballot_.sum()
        least = np.full(len(rows), np.inf)
        found = np.zeros((len(rows), len(share)))

        def voted(down: slice, tiles: Tiles) -> None:
            least[down], found[down] = np.inf, 0.0
            for across, tile in tiles:
                closest = tile.min(1)
                better = closest < least[down]
                found[down] = np.where(better[:, None], 0.0, found[down])
                least[down] = np.minimum(least[down], closest)
                # Equally near points vote.
                found[down] += (tile == least[down][:, None]) @ self.ballot_[across]

        rows.strips(self.rows_, voted)
        if not near:
            found = np.where((least < COINCIDENT)[:, None], found, share)
        return found, np.zeros(len(rows))

    def decision_function(self, X: Any) -> Array:
        """Scores over each row's greatest: [n] of the second class less the first where there are two, else [n, classes]."""
        found, _ = self._scores(X)
        found = found / np.maximum(np.abs(found).max(1, keepdims=True), 1e-300)
        return found[:, 1] - found[:, 0] if len(self.classes_) == 2 else found

    def log_scale(self, X: Any) -> Array:
        """The logarithm of each row's greatest score, which :meth:`decision_function` divides by; kernels of deep networks are e^(-1000)."""
        found, log = self._scores(X)
        with np.errstate(divide="ignore"):
            return np.log(np.abs(found).max(1)) + log

    def predict(self, X: Any) -> Array:
        """Labels [n]."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]


class InfiniteRegressor(RegressorMixin, _Infinite):
    """An infinitely wide network of finite depth for one target or several: y' (K + ridge)⁻¹ k(x).

    Args:
        activation, kernel, sphere, ridge, memory: as for :class:`InfiniteClassifier`.
        depth: layers; an infinite depth is refused, as its values vanish away from the training points. Deeper is usually worse.

    Equal points count as one with their mean target.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> bool(InfiniteRegressor(depth=1, ridge=0.1).fit(X[::2], y[::2]).score(X[1::2], y[1::2]) > 0.4)
    True
    """

    def __init__(
        self,
        activation: Any = "relu",
        depth: float = 3,
        kernel: str = "ntk",
        *,
        sphere: Any = "cap",
        ridge: float = 0.0,
        memory: Any = "1GB",
    ):
        self.activation = activation
        self.depth = depth
        self.kernel = kernel
        self.sphere = sphere
        self.ridge = ridge
        self.memory = memory

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> InfiniteRegressor:
        """Learn from X [n, features] and targets y [n] or [n, targets]."""
        require(
            self.depth != math.inf,
            "depth: an infinitely deep network's values vanish away from the training points; expected a finite depth, such as 3",
        )
        _check(self)
        X, y = validated(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=float)
        self._flat = y.ndim == 1
        dual = dual_of(self.activation)
        rows, means, _ = self._prepared(X, y.reshape(len(y), -1))
        self.rows_ = rows
        self._solve(dual, rows, means)
        return self

    def predict(self, X: Any) -> Array:
        """Predictions [n] or [n, targets]."""
        rows = self._mapped(X)
        found = product(self.values_, rows, self.rows_, self.weights_)
        return found[:, 0] if self._flat else found


def _check(estimator: Any) -> None:
    one_of("kernel", estimator.kernel, ("nngp", "ntk"))
    if estimator.depth != math.inf:
        number("depth", estimator.depth, low=1, integer=True)
    number("ridge", estimator.ridge, low=0)
    bytes_of(estimator.memory)


def _deep(table: LogTable, rows: Rows, training: Rows, weights: Array) -> tuple[Array, Array]:
    """Σ_i weights_i k(x_i, x) where k may be e^(-1000): a factor, and the logarithm of what multiplies it."""
    found = np.zeros((len(rows), weights.shape[1]))
    log = np.zeros(len(rows))
    height = max(1, min(len(rows), (1 << 21) // max(len(training), 1)))

    def shifted(down: slice, tiles: Tiles) -> None:
        for _, tile in tiles:
            logs = table(np.clip(tile, 0, 1))
            top = logs.max(1)
            require(
                bool(np.isfinite(top).all()),
                "X: a row is orthogonal to all training points, so that its kernel is zero",
            )
            found[down] = np.exp(logs - top[:, None]) @ weights
            log[down] = top - table.at_one

    rows.strips(training, shifted, height, len(training))
    return found, log
