"""Variance explained by many features at many sites against the forward passes alone, and RSA against rsatoolbox."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lineament.bench import Row, compare, quick
from lineament.core.models import frozen
from lineament.data.samples import Samples
from lineament.measure.bias.consequences import rsa
from lineament.measure.bias.variance import variance_explained
from lineament.recipes.kit.networks import network

SLUG = "representation-bias"


def rows(repeats: int = 5) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    count, patterns = (256, 512) if quick() else (1024, 4096)
    net = network("resnet18", (3, 32, 32), 10, seed=0, widths=16).eval()
    images = torch.randn(count, 3, 32, 32, generator=draw)
    features = {f"feature {k}": torch.randint(2, (count,), generator=draw) for k in range(20)}
    sites = ["features.2", "features.4", "features.6", "features.8", "head:in"]
    data = Samples(images, torch.zeros(count, dtype=torch.long))

    def forwards() -> None:
        with frozen(net), torch.no_grad():
            for part in images.split(256):
                net(part)

    yield compare(
        SLUG,
        f"variance explained, 20 features at 5 sites, {count:,} images (ResNet-18 of width 16, 32 x 32)",
        lambda: variance_explained(net, data, features, sites=sites),
        "the forward passes alone",
        forwards,
        target=1 / 1.1,
        repeats=repeats,
        note="the limit is 1: one pass, N d p operations beside it",
    )

    phi = {site: torch.randn(4096, 256, generator=draw).double() for site in sites}
    columns = {f"feature {k}": torch.randint(2, (4096,), generator=draw) for k in range(20)}
    fitted = torch.arange(4096) % 2 == 0

    def looped() -> list[float]:
        from sklearn.linear_model import LinearRegression
        from sklearn.metrics import r2_score

        found = []
        for x in phi.values():
            for f in columns.values():
                F, x_np, rows = f.double().numpy()[:, None], x.numpy(), fitted.numpy()
                model = LinearRegression().fit(F[rows], x_np[rows])
                found.append(
                    float(r2_score(x_np[~rows], model.predict(F[~rows]), multioutput="variance_weighted"))
                )
        return found

    from lineament.measure.bias.variance import representation_variance

    yield compare(
        SLUG,
        "variance explained, 20 features, 5 representations of 4,096 x 256, float64 (ours: unit by unit, jointly and decoded too)",
        lambda: representation_variance(phi, columns, test=~fitted),
        "scikit-learn's LinearRegression and r2_score, one by one",
        looped,
        target=10.0,
        repeats=repeats,
        note="one product a representation serves all features",
    )

    x, y = (torch.randn(patterns, 128, generator=draw) for _ in range(2))
    try:
        from rsatoolbox.data import Dataset  # pyright: ignore
        from rsatoolbox.rdm import calc_rdm  # pyright: ignore
        from rsatoolbox.rdm import compare as compared  # pyright: ignore
    except ImportError:
        peer = None
    else:

        def peer() -> float:
            made = [calc_rdm(Dataset(v.numpy()), method="correlation") for v in (x, y)]
            return float(compared(*made, method="spearman").item())

    yield compare(
        SLUG,
        f"RSA of {patterns:,} patterns of 128 units, Pearson and Spearman",
        lambda: rsa(x, y, kendall=False),
        "rsatoolbox, Spearman",
        peer,
        target=3.0,
        repeats=repeats,
        note="a product, and a sort of half the pairs",
    )


if __name__ == "__main__":
    for row in rows():
        print(row)
