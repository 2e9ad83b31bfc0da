"""HOG, LBP and Gabor of many images at once against scikit-image's and OpenCV's loops, one thread.

Bounds: a HOG of 32 x 32 is 1,024 gradients at about 10 ns (10 us), an LBP eight bilinear maps (about 10 us), 18 Gabor filters two matrix products each (0.15 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lineament.bench import Row, compare, quick
from lineament.handcrafted import gabor, gabor_kernel, hog, lbp

SLUG = "bangla-digits"


def rows(repeats: int = 5) -> Iterator[Row]:
    n = 64 if quick() else 512
    few = min(n, 16 if quick() else 64)
    images = torch.randint(0, 256, (n, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = images.numpy()
    floats = images.float() / 255
    skimage, cv2 = _module("skimage.feature"), _module("cv2")
    filters = _module("skimage.filters")
    yield _row("HOG, 32 x 32, cell 8", lambda: hog(floats), "skimage.feature.hog, image by image",
               skimage and (lambda: [skimage.hog(p, 9, (8, 8), (2, 2)) for p in pictures[:few]]), 15.0, n / few, repeats, "10 us an image")  # fmt: skip
    if cv2 is not None:
        cv2.setNumThreads(1)
    descriptor = cv2 and cv2.HOGDescriptor((32, 32), (16, 16), (8, 8), (8, 8), 9)
    yield _row("HOG, like OpenCV", lambda: hog(images, like="opencv"), "cv2.HOGDescriptor.compute, image by image",
               descriptor and (lambda: [descriptor.compute(p) for p in pictures]), 1.5, 1.0, repeats, "10 us an image")  # fmt: skip
    yield _row("LBP, nri_uniform, grid 4", lambda: lbp(images), "skimage local_binary_pattern, image by image",
               skimage and (lambda: [_lbp(skimage, p) for p in pictures[:few]]), 10.0, n / few, repeats, "10 us an image")  # fmt: skip
    angles = [(f, k * np.pi / 6) for f in (0.1, 0.2, 0.3) for k in range(6)]
    tiny = min(few, 4)
    yield _row("Gabor, 18 filters", lambda: gabor(floats), "skimage.filters.gabor, image by image",
               filters and (lambda: [filters.gabor(p / 255, f, theta=t) for p in pictures[:tiny] for f, t in angles]), 100.0, n / tiny, repeats, "0.15 ms an image")  # fmt: skip
    kernels = [np.asarray(gabor_kernel(f, t)) for f, t in angles]
    yield _row("Gabor, 18 filters", lambda: gabor(floats), "FFT of each image and filter (NumPy)",
               lambda: [_fft(pictures[k], kernels) for k in range(tiny)], 8.0, n / tiny, repeats, "0.15 ms an image")  # fmt: skip
    yield _row("Gabor, 18 filters", lambda: gabor(floats), "cv2.filter2D, image by image",
               cv2 and (lambda: [_filter(cv2, p, kernels) for p in pictures[:few].astype(np.float32)]), 2.0, n / few, repeats, "0.15 ms an image")  # fmt: skip


def _row(
    what: str,
    ours: Callable[[], Any],
    peer: str,
    theirs: Any,
    target: float,
    scale: float,
    repeats: int,
    bound: str,
) -> Row:
    return compare(
        SLUG,
        what,
        ours,
        peer,
        theirs or None,
        target=target,
        repeats=repeats,
        scale=scale,
        note=f"bound {bound}",
    )


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _lbp(skimage: Any, picture: np.ndarray) -> np.ndarray:
    codes = skimage.local_binary_pattern(picture, 8, 1, "nri_uniform").astype(int)
    return np.concatenate(
        [np.bincount(c.ravel(), minlength=59) / c.size for r in np.split(codes, 4) for c in np.split(r, 4, 1)]
    )


def _fft(picture: np.ndarray, kernels: list[np.ndarray]) -> list[np.ndarray]:
    size = 32 + max(max(k.shape) for k in kernels)
    spectrum = np.fft.fft2(picture / 255, (size, size))
    return [np.abs(np.fft.ifft2(spectrum * np.fft.fft2(k, (size, size)))) for k in kernels]


def _filter(cv2: Any, picture: np.ndarray, kernels: list[np.ndarray]) -> list[np.ndarray]:
    return [np.hypot(cv2.filter2D(picture, -1, k.real), cv2.filter2D(picture, -1, k.imag)) for k in kernels]
