"""Units of two networks: all correlations against one stacked product, matching, a whole alignment against the forwards, CKA, sparse paths."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.core.sites.activations import capture
from lineament.measure.alignment.joint import JointMoments
from lineament.measure.alignment.matching import matching
from lineament.measure.alignment.profile import AlignmentOptions, alignment
from lineament.measure.alignment.similarity import BatchKernels
from lineament.measure.alignment.sparse import lasso_path
from lineament.recipes.kit.networks import network

SLUG = "convergent-learning"


def found(name: str) -> Any:
    """A peer's module, or ``None`` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def units(samples: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, width // 4, generator=generator)
    mixes = [torch.randn(width // 4, width, generator=generator) for _ in range(2)]
    return tuple((shared @ m + torch.randn(samples, width, generator=generator)).relu() for m in mixes)  # pyright: ignore[reportReturnType]


def moments(x: Tensor, y: Tensor, batch: int = 2048) -> JointMoments:
    made = JointMoments([x.shape[1], y.shape[1]], blocks=1, nulls=())
    for a, b in zip(x.split(batch), y.split(batch)):
        made.update([a[:, None], b[:, None]])
    return made


def rows(repeats: int = 5) -> Iterator[Row]:
    width, samples = (256, 4096) if quick() else (1024, 16_384)
    x, y = units(samples, width)

    def stacked() -> Tensor:
        both = torch.cat([x, y], 1)
        both = both - both.mean(0)
        both /= both.square().mean(0).sqrt()
        return both.T @ both / len(both)

    yield compare(
        SLUG, f"all correlations within and between, 2 x {width:,} units ({samples:,} samples)",
        lambda: moments(x, y).correlations(), "one stacked product, float32", stacked, target=1 / 0.7, repeats=repeats,
        note="the mirror half of a symmetric product is free: the limit is 2; ours is float64 from batch to batch, and streams",
    )  # fmt: skip

    netrep = found("netrep.metrics")
    width, samples = (128, 4096) if quick() else (512, 50_000)
    x, y = units(samples, width)
    peer = (
        None
        if netrep is None
        else lambda: netrep.PermutationMetric(center_columns=True).fit(x.numpy(), y.numpy())
    )
    yield compare(
        SLUG, f"correlations and the one-to-one matching, {width} units ({samples:,} samples)",
        lambda: matching(moments(x, y).correlations(0, 1)), "netrep PermutationMetric", peer, target=1, repeats=repeats,
        note="ours also has the correlations within; memory does not grow with the samples",
    )  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    nets = [
        network("resnet18", (3, 32, 32), 10, seed=seed, widths=16 if quick() else 64).eval()
        for seed in (0, 1)
    ]
    count = 2 if quick() else 4
    loader = [
        (torch.randn(64, 3, 32, 32, generator=generator), torch.zeros(64, dtype=torch.long))
        for _ in range(count)
    ]
    sites = ["features.2", *(f"features.{k}" for k in (4, 6, 8, 10))]

    def forwards() -> None:
        with torch.no_grad():
            for images, _ in loader:
                for net in nets:
                    net(images)

    yield compare(
        SLUG, f"alignment of two ResNet-18 with its null, 5 sites ({64 * count} images of 32 x 32)",
        lambda: alignment(*nets, loader, sites=sites, nulls=("shuffled",), blocks=4, options=AlignmentOptions(keep=0)),
        "both forwards alone", forwards, target=1 / 1.15, repeats=max(1, repeats - 2),
        note="the limit is about 1 for many images; matching, errors by blocks and CKA of all sites are a fixed cost beside few of them",
    )  # fmt: skip

    torch_cka = found("torch_cka")
    small = [network("resnet18", (3, 32, 32), 10, seed=seed, widths=8).eval() for seed in (0, 1)]
    layers = [
        name for name, module in small[0].named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    images = torch.utils.data.DataLoader([(x, 0) for batch, _ in loader[:1] for x in batch], batch_size=64)  # pyright: ignore[reportArgumentType]

    def ours() -> Tensor:
        kernels = BatchKernels(2 * len(layers))
        with torch.no_grad(), capture(small[0], layers) as a, capture(small[1], layers) as b:
            for x, _ in images:
                for net in small:
                    net(x)
                kernels.update([*a.values(), *b.values()])
        return kernels.cka()

    def theirs() -> None:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            measure = torch_cka.CKA(*small, model1_layers=layers, model2_layers=layers, device="cpu")
            measure.compare(images)
            for model in (measure.model1, measure.model2):  # it leaves its hooks behind
                for module in model.modules():
                    module._forward_hooks.clear()

    yield compare(
        SLUG, f"debiased CKA, {len(layers)} layers by {len(layers)}, two ResNet-18 of width 8 ({len(images)} batch of 64), forwards included",
        ours, "torch_cka", None if torch_cka is None else theirs, target=10, repeats=max(1, repeats - 2),
        note="L kernels a batch in place of 2 L², and all pairs are one product; ours also has the layers of each network among themselves",
    )  # fmt: skip

    width = 64 if quick() else 128
    x, y = (u.double() for u in units(4000, width))
    x, y = ((u - u.mean(0)) / u.std(0, correction=0) for u in (x, y))
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    penalties = torch.logspace(-0.5, -3, 20, dtype=torch.float64).tolist()
    from sklearn.linear_model import Lasso
    from sklearn.linear_model import lasso_path as path

    some = 16
    yield compare(
        SLUG, f"sparse maps of {width} units from {width}, 20 penalties, objectives to 1e-6",
        lambda: lasso_path(gram, cross, penalties, polish=False), "scikit-learn lasso_path given the Gram matrix",
        lambda: [path(x.numpy(), y[:, j].numpy(), alphas=penalties, precompute=gram.numpy() * len(x), tol=1e-6) for j in range(some)],
        target=4, repeats=max(1, repeats - 2), scale=width / some, note=f"the peer is timed on {some} of {width} targets; ours takes 1,560 products, three times what the bound of 75 ms counts",
    )  # fmt: skip

    def one_by_one() -> None:
        for lam in penalties[::5]:
            Lasso(alpha=lam, tol=1e-6, fit_intercept=False).fit(x.numpy(), y[:, :4].numpy())

    yield compare(
        SLUG, f"the same, from {len(x):,} samples",
        lambda: lasso_path(x.T @ x / len(x), x.T @ y / len(x), penalties, polish=False), "scikit-learn Lasso", one_by_one,
        target=60, repeats=1, scale=width / 4 * len(penalties) / len(penalties[::5]), note=f"the peer is timed on 4 of {width} targets and 4 of 20 penalties",
    )  # fmt: skip
