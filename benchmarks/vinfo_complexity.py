"""Complexity of a thousand features against the forwards alone, its solve against scikit-learn, and codes and NMF against overcomplete and scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lineament.bench import Row, compare, quick
from lineament.dictionaries.factorisations import hals_step, start
from lineament.dictionaries.nnls import sweep
from lineament.measure.complexity.layers import complexity
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Residuals
from lineament.recipes.kit.networks import network

SLUG = "vinfo-complexity"


def rows(repeats: int = 5) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    samples, features = (512, 1000) if quick() else (4096, 1000)
    # ResNet-20: three residual blocks for each of three widths; here two, with the stem and the head's input eight sites.
    net = network("resnet14", (3, 32, 32), 10, seed=0, widths=16).eval()
    images, labels = torch.randn(samples, 3, 32, 32, generator=generator), torch.zeros(samples)
    sites = [name for name, _ in net.features.named_children() if int(name) >= 2]
    sites = [f"features.{name}" for name in sites[:7]] + ["head:in"]
    z = torch.randn(samples, features, generator=generator)

    # What PyTorch imports at the first capture is not timed.
    complexity(net, (images[:64], labels[:64]), z[:64], sites=sites)

    def forwards() -> None:
        with torch.no_grad():
            for part in images.split(256):
                net(part)

    yield compare(
        SLUG,
        f"complexity of {features:,} features at {len(sites)} sites, N = {samples:,}, a ResNet of width 16 on 32 x 32 images",
        lambda: complexity(net, (images, labels), z, sites=sites),
        "the forwards alone",
        forwards,
        target=1 / 1.15,
        repeats=repeats,
        note="features given; memory is free of N; the limit is 1 / 1.04; coding by NNLS is another row",
    )

    n, d, k = (1000, 128, 200) if quick() else (8000, 512, 1000)
    x = torch.randn(n, d, generator=generator)
    z = x[:, :50] @ torch.randn(50, k, generator=generator) + torch.randn(n, k, generator=generator)

    def ours() -> torch.Tensor:
        moments = ReadoutMoments()
        moments.update({"x": x}, z)
        return moments.readouts(1e-3).weights["x"]

    from sklearn.linear_model import Ridge

    def theirs() -> Any:
        scale = x.numpy().std(0)
        return Ridge(alpha=1e-3 * n, solver="cholesky").fit(x.numpy() / scale, z.numpy())

    what = f"read-outs of {k:,} features from {d} activations, N = {n:,}"
    yield compare(SLUG, what, ours, "scikit-learn Ridge, all targets", theirs, target=1.5, repeats=repeats)
    some = 10

    def loop() -> None:
        scale = x.numpy().std(0)
        for column in range(some):
            Ridge(alpha=1e-3 * n, solver="cholesky").fit(x.numpy() / scale, z[:, column].numpy())

    yield compare(
        SLUG, what, ours, "scikit-learn Ridge, feature by feature", loop, target=100, repeats=min(repeats, 3), scale=k / some,
        note=f"the loop is timed on {some} of the features",
    )  # fmt: skip

    def judged() -> object:
        moments = ReadoutMoments()
        moments.update({"x": x}, z)
        look = Residuals(moments.readouts(1e-3))
        look.update({"x": x}, z)
        return look.compute()

    yield compare(
        SLUG, f"read-outs and residuals with standard errors, {what.partition(' ')[2]}", judged, "scikit-learn Ridge, all targets, and R²",
        lambda: (lambda fit: 1 - ((z.numpy() - fit.predict(x.numpy())) ** 2).mean(0))(theirs()), target=1.0, repeats=repeats,
    )  # fmt: skip

    n, d, k = (2000, 128, 100) if quick() else (20_000, 512, 500)
    a = torch.rand(n, d, generator=generator)
    atoms = torch.rand(k, d, generator=generator)
    codes = torch.rand(n, k, generator=generator)
    peer: Callable[[], object] | None = None
    try:
        from overcomplete.optimization.nmf import hierarchical_als  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:

        def updated() -> object:
            return hierarchical_als(a, codes.clone(), atoms, update_Z=True, update_D=False, max_iter=1)

        peer = updated

    yield compare(
        SLUG,
        f"one sweep of HALS over the codes, n = {n:,}, d = {d}, k = {k}",
        lambda: sweep(codes.T.contiguous(), atoms @ a.T, atoms @ atoms.T),
        "overcomplete 0.3.0",
        peer,
        target=4.0,
        repeats=repeats,
        note="the limit is two GEMMs, 2 n k (d + k) operations",
    )

    from sklearn.decomposition import NMF

    k = 50
    begin = start(a, k, "nndsvda", generator)

    def factorise() -> object:
        codes, atoms = begin
        for _ in range(3):
            codes, atoms = hals_step(a, codes, atoms)
        return codes

    def sklearn() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            w, h = (np.ascontiguousarray(part.numpy()) for part in begin)
            parts: Any = k
            return NMF(parts, init="custom", max_iter=3, tol=0).fit_transform(
                a.numpy(), W=w.copy(), H=h.copy()
            )

    yield compare(
        SLUG, f"three rounds of NMF, n = {n:,}, d = {d}, k = {k}", factorise, "scikit-learn cd", sklearn, target=1.2, repeats=repeats
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
