"""The descriptors as scikit-learn transformers: in pipelines, grid searches and column transformers, on images or flat rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from lineament.core.checks import InputError, number, require, show
from lineament.core.estimator_data import validated
from lineament.handcrafted.gabor import angles_of, frequencies_of, gabor, gabor_kernel
from lineament.handcrafted.hog import hog, hog_length
from lineament.handcrafted.images import batch_of
from lineament.handcrafted.ink import drawn, grey_levels, white_of
from lineament.handcrafted.lbp import label_count, lbp, lbp_codes


class _Images(TransformerMixin, BaseEstimator):
    """What they share: rows of numbers become images, images become rows of features with names."""

    image_shape: Any
    n_features_in_: int

    def fit(self, X: Any, y: Any = None) -> Any:
        """Learn the shape of the images; nothing else, unless the class says so. ``notes_`` tell what was noticed: constant images, rows left over, large kernels."""
        images = self._images(X, reset=True)
        self.image_shape_ = tuple(images.shape[1:])
        flat = images.flatten(1)
        constant = int((flat == flat[:, :1]).all(1).sum())
        self.notes_: tuple[str, ...] = self._noticed(images)
        if constant:
            self.notes_ += (f"{constant} of {len(images)} images are constant and have no edges",)
        self._learn(images)
        self.n_features_out_ = self._described(images[:1]).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The features of each image, [n, features]."""
        check_is_fitted(self)
        images = self._images(X, reset=False)
        require(
            tuple(images.shape[1:]) == self.image_shape_,
            f"X: got images of shape {tuple(images.shape[1:])}, fitted on {self.image_shape_}",
        )
        with torch.no_grad():
            found = self._described(images)
        return found.numpy().astype(np.result_type(images.numpy().dtype, np.float32), copy=False)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """A name for each feature, by place and what is measured there."""
        check_is_fitted(self)
        if input_features is not None and hasattr(self, "n_features_in_"):
            known = getattr(self, "feature_names_in_", None)
            if len(input_features) != self.n_features_in_:
                raise ValueError("input_features should have length equal to number of features")
            if known is not None and not np.array_equal(known, np.asarray(input_features, dtype=object)):
                raise ValueError("input_features is not equal to feature_names_in_")
        return np.asarray(self._names(), dtype=object)

    def _learn(self, images: Tensor) -> None:
        """What fitting learns beyond the shape."""

    def _noticed(self, images: Tensor) -> tuple[str, ...]:
        """What a user should be told of these images and settings."""
        return ()

    def _described(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _names(self) -> list[str]:
        raise NotImplementedError

    def _images(self, X: Any, *, reset: bool) -> Tensor:
        """[n, height, width(, channels)] or flat rows, as a tensor [n, (channels,) height, width]."""
        if isinstance(X, Tensor):
            X = X.detach().cpu().numpy()
        several = type(X) in (list, tuple) or (
            isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype == object
        )
        sizes = {np.shape(image) for image in X} if several else set()
        require(
            len(sizes) < 2, f"X: images of unequal sizes {sorted(map(str, sizes))[:3]}, expected one size"
        )
        if len(sizes) == 1 and len(next(iter(sizes))) > 1:
            X = np.asarray(list(X))
        if getattr(X, "ndim", 2) in (3, 4):
            flat = X.reshape(len(X), int(np.prod(X.shape[1:])))
            shape = X.shape[1:]
        else:
            flat, shape = X, None
        flat: Any = validated(self, flat, reset=reset, dtype=[np.float64, np.float32, np.uint8])
        if shape is None:
            shape = self._shape(flat.shape[1])
        images = torch.from_numpy(np.require(flat, requirements=["C", "W"]).reshape(len(flat), *shape))
        scale = getattr(self, "scale", None)
        if scale is not None:
            images = images / scale
        return images.movedim(-1, 1) if len(shape) == 3 else images

    def _shape(self, length: int) -> tuple[int, ...]:
        """The sizes of an image of so many numbers, one of them perhaps open (-1)."""
        given = self.image_shape
        if given is None:
            side = round(length**0.5)
            require(
                side * side == length,
                f"image_shape: {length} numbers a row make no square image; expected its (height, width)",
            )
            return side, side
        shape = tuple(int(side) for side in given)
        require(
            len(shape) in (2, 3) and shape.count(-1) <= 1 and all(s > 0 or s == -1 for s in shape),
            f"image_shape: got {show(given)}, expected (height, width) or (height, width, channels), one of them -1 at most",
        )
        known = abs(int(np.prod(shape)))
        fits = length % known == 0 if -1 in shape else length == known
        if not fits:
            raise InputError(f"image_shape: got {show(given)}, but a row has {length} numbers")
        return tuple(length // known if side == -1 else side for side in shape)


class HogFeatures(_Images):
    """Histograms of oriented gradients of each image; see :func:`lineament.handcrafted.hog`.

    Args:
        orientations, cell, block, norm, sqrt, signed, binning, like: as for the function.
        scale: what grey levels are divided by first; ``None`` leaves them (block norms make most of it cancel).
        image_shape: (height, width) or (height, width, channels) of a flat row, one of them may be -1; square by default.

    >>> HogFeatures().fit_transform(np.random.rand(4, 32, 32)).shape
    (4, 324)
    """

    def __init__(
        self,
        orientations: int = 9,
        cell: Any = 8,
        block: Any = 2,
        *,
        norm: str = "L2-Hys",
        sqrt: bool = False,
        signed: bool = False,
        binning: str = "hard",
        like: str = "skimage",
        scale: float | None = None,
        image_shape: Any = None,
    ):
        self.orientations = orientations
        self.cell = cell
        self.block = block
        self.norm = norm
        self.sqrt = sqrt
        self.signed = signed
        self.binning = binning
        self.like = like
        self.scale = scale
        self.image_shape = image_shape

    def _described(self, images: Tensor) -> Tensor:
        return hog(
            images, self.orientations, self.cell, self.block, norm=self.norm, sqrt=self.sqrt,  # pyright: ignore
            signed=self.signed, binning=self.binning, like=self.like,  # pyright: ignore
        )  # fmt: skip

    def _noticed(self, images: Tensor) -> tuple[str, ...]:
        cells = self.cell if isinstance(self.cell, (tuple, list)) else (self.cell, self.cell)
        rows, columns = (side % cell for side, cell in zip(images.shape[-2:], cells))
        return (f"{rows} rows and {columns} columns beyond the last whole cell are left out",) * (
            rows + columns > 0
        )

    def _names(self) -> list[str]:
        height, width = self.image_shape_[-2:]
        sizes = hog_length(height, width, self.orientations, self.cell, self.block)
        turn = (1, 0, 3, 2, 4) if self.like == "opencv" else (0, 1, 2, 3, 4)
        places = np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), [sizes[k] for k in turn]), 1)
        return [
            "hog_block{}x{}_cell{}x{}_bin{}".format(*(place[turn.index(k)] for k in range(5)))
            for place in places
        ]


class LbpFeatures(_Images):
    """Histograms of local binary patterns; see :func:`lineament.handcrafted.lbp`.

    Args:
        points, radius, codes, grid: as for the function.
        bins: of ``codes="var"``, whose edges are quantiles of the training images.
        scale, image_shape: as for :class:`HogFeatures`.

    >>> LbpFeatures().fit_transform(np.zeros((4, 32, 32), dtype=np.uint8)).shape
    (4, 944)
    """

    def __init__(
        self,
        points: int = 8,
        radius: float = 1,
        *,
        codes: str = "nri_uniform",
        grid: int | None = 4,
        bins: int = 16,
        scale: float | None = None,
        image_shape: Any = None,
    ):
        self.points = points
        self.radius = radius
        self.codes = codes
        self.grid = grid
        self.bins = bins
        self.scale = scale
        self.image_shape = image_shape

    def _learn(self, images: Tensor) -> None:
        self.edges_ = None
        if self.codes == "var":
            seen = lbp_codes(images, self.points, self.radius, codes="var").flatten().double().numpy()
            inner = np.arange(1, self.bins) / self.bins
            self.edges_ = np.unique(np.quantile(seen, inner))

    def _described(self, images: Tensor) -> Tensor:
        edges = None if self.edges_ is None else torch.from_numpy(self.edges_)
        return lbp(images, self.points, self.radius, codes=self.codes, grid=self.grid, edges=edges)  # pyright: ignore

    def _names(self) -> list[str]:
        count = label_count(self.points, self.codes) if self.edges_ is None else len(self.edges_) + 1
        return [f"lbp_{cell}_label{k}" for cell in _cells(self.grid) for k in range(count)]


class GaborFeatures(_Images):
    """Means and deviations of Gabor responses; see :func:`lineament.handcrafted.gabor`.

    Args:
        frequencies, orientations, grid, bandwidth, dc, border: as for the function.
        scale, image_shape: as for :class:`HogFeatures`.

    >>> GaborFeatures().fit_transform(np.random.rand(4, 32, 32)).shape
    (4, 576)
    """

    def __init__(
        self,
        frequencies: Any = (0.1, 0.2, 0.3),
        orientations: Any = 6,
        *,
        grid: int | None = 4,
        bandwidth: float = 1.0,
        dc: bool = False,
        border: str = "reflect",
        scale: float | None = None,
        image_shape: Any = None,
    ):
        self.frequencies = frequencies
        self.orientations = orientations
        self.grid = grid
        self.bandwidth = bandwidth
        self.dc = dc
        self.border = border
        self.scale = scale
        self.image_shape = image_shape

    def _described(self, images: Tensor) -> Tensor:
        return gabor(
            images, self.frequencies, self.orientations, grid=self.grid, bandwidth=self.bandwidth,
            dc=self.dc, border=self.border,  # pyright: ignore
        )  # fmt: skip

    def _noticed(self, images: Tensor) -> tuple[str, ...]:
        sides = [
            gabor_kernel(f, turn, bandwidth=self.bandwidth).shape[0]
            for f in frequencies_of(self.frequencies)
            for turn in angles_of(self.orientations)
        ]
        large = sum(side > min(images.shape[-2:]) for side in sides)
        return (
            f"{large} of {len(sides)} kernels are larger than the images (up to {max(sides)} pixels); the border is repeated",
        ) * (large > 0)

    def _names(self) -> list[str]:
        counted = isinstance(self.orientations, (int, np.integer))
        turns = range(self.orientations) if counted else self.orientations
        filters = [f"f{f:g}_t{turn:g}" for f in self.frequencies for turn in turns]
        return [
            f"gabor_{name}_{what}_{cell}"
            for name in filters
            for what in ("mean", "std")
            for cell in _cells(self.grid)
        ]


class InkImages(_Images):
    """Pixels after :func:`lineament.handcrafted.ink`, as flat rows; ``notes_`` say what fitting saw.

    Args:
        size, white, polarity, otsu, crop, margin: as for the function.
        image_shape: as for :class:`HogFeatures`.

    >>> InkImages().fit_transform(np.random.rand(4, 20, 20)).shape
    (4, 1024)
    """

    def __init__(
        self,
        size: int | None = 32,
        *,
        white: float | None = None,
        polarity: bool = True,
        otsu: bool = False,
        crop: bool = True,
        margin: int = 2,
        image_shape: Any = None,
    ):
        self.size = size
        self.white = white
        self.polarity = polarity
        self.otsu = otsu
        self.crop = crop
        self.margin = margin
        self.image_shape = image_shape

    def _learn(self, images: Tensor) -> None:
        white = self.white
        if white is None:
            most = grey_levels(batch_of(images, keep_bytes=True))[1]
            white, told = white_of(images, most)
            white = max(white, most)
            self.notes_ += tuple(told)
        number("white", white, low=0, open_low=True)
        self.white_: float = white
        self.notes_ += self._made(images).notes

    def _made(self, images: Tensor) -> Any:
        return drawn(
            batch_of(images, keep_bytes=True), self.white_, size=self.size, polarity=self.polarity, otsu=self.otsu,
            crop=self.crop, margin=self.margin,
        )  # fmt: skip

    def _described(self, images: Tensor) -> Tensor:
        return self._made(images).images.flatten(1)

    def _names(self) -> list[str]:
        height, width = (self.size, self.size) if self.size else self.image_shape_[-2:]
        return [f"pixel_{row}x{column}" for row in range(height) for column in range(width)]


def _cells(grid: int | None) -> list[str]:
    return ["whole"] if grid is None else [f"cell{r}x{c}" for r in range(grid) for c in range(grid)]
