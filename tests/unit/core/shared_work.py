"""What two processes do together, run by `torchrun` for test_shards.py: every answer, beside that of one process, goes into a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament.audit import audit
from lineament.audit.compare import CompareOptions, compare
from lineament.core import shards
from lineament.core.curvature.matrices import hessian
from lineament.core.statistics.moments import Moments
from lineament.measure.alignment.profile import AlignmentOptions, alignment
from lineament.measure.collapse.profile import collapse
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import line
from lineament.measure.landscape.spectrum import mean_gradient, spectrum


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 8), nn.Tanh(), nn.Linear(8, 3)
        )


def samples(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 3


SMALL = CompareOptions(batch_size=20)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = samples()
    return list(zip(x.split(10), y.split(10)))


def moments() -> list[float]:
    stream = Moments()
    for x, _ in shards.mine(batches()):
        stream.update(x.flatten(1))
    return shards.merged(stream).kurtosis.tolist()


def product() -> list[float]:
    curvature = hessian(network(), nn.functional.cross_entropy, batches())
    return (curvature @ torch.linspace(-1, 1, curvature.shape[0])).tolist()


def ends_of_the_spectrum() -> list[float]:
    curvature = hessian(network(), nn.functional.cross_entropy, batches())
    return spectrum(curvature, steps=12, probes=2).values.tolist()


def slope() -> list[float]:
    parts = [batches()[:3], batches()[3:]]
    found = mean_gradient(network(), nn.functional.cross_entropy, parts)
    return [found.norm, found.noise, found.loss]


def collapsed() -> list[float]:
    found = collapse(network(), batches(), sites=["1", "5:in"])
    return [v for m in found.metrics.values() for v in (m.nc1, m.nc1_tilde, m.nc2, m.nc4)]


def one_batch_only() -> list[float]:
    """Less work than processes: one of them has none."""
    return collapse(network(), batches()[:1], sites=["5:in"])["5:in"].variances.tolist()


def losses() -> list[float]:
    net = network()
    return line(
        net, nn.functional.cross_entropy, batches(), random_axes(net, 1)[0], at=[-1.0, 0.0, 1.0]
    ).loss.tolist()


def units_of(data: Any, **options: Any) -> list[float]:
    found = alignment(network(), network(1), data, sites=["1", "4"], **options)
    numbers = [
        found.cka.flatten(),
        *(top.flatten() for top in (*found.top_a.values(), *found.top_b.values())),
    ]
    for site in found.sites.values():
        assert site.mean_errors is not None and site.errors is not None
        numbers += [site.correlations.flatten(), site.nulls["shuffled"].match, site.errors]
        numbers += [site.information(bins=4).flatten(), site.sparse_maps([0.01]).half_mse.flatten()]
    return [value for each in numbers for value in each.tolist()]


def units() -> list[float]:
    """Stored data, of which fewer rows are kept than there are."""
    return units_of(samples(200), options=AlignmentOptions(keep=300), positions=9)


def streamed_units() -> list[float]:
    return units_of(batches(), blocks=3)


def squares() -> list[int]:
    return shards.each(range(7), lambda k: k * k)


SHARED = {
    f.__name__: f
    for f in (
        moments,
        product,
        ends_of_the_spectrum,
        slope,
        collapsed,
        one_batch_only,
        losses,
        units,
        streamed_units,
        squares,
    )
}


def said(work) -> str:
    try:
        shards.guarded("a test", work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fails_in_rank_1(k: int = 0) -> int:
    if torch.distributed.get_rank() == 1:
        raise MemoryError("not enough memory")
    return k


def errors() -> dict[str, str]:
    rank = torch.distributed.get_rank()
    return {
        "in a share": said(lambda: shards.each(range(4), fails_in_rank_1)),
        "before a share": said(lambda: (fails_in_rank_1(), shards.each(range(4), abs))),
        "at the end": said(lambda: (shards.each(range(4), abs), fails_in_rank_1())),
        "in all": said(lambda: 1 // 0),
        "what cannot be sent": said(lambda: shards.each(range(4), lambda k: (lambda: k) if rank else k)),
        "other work": said(lambda: shards.each(range(4 + rank), abs)),
        "other data": said(lambda: shards.alike("data", str(rank))),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {"alone": {name: work() for name, work in SHARED.items()}}
    with shards.shared():
        found["shared"] = {name: work() for name, work in SHARED.items()}
        found["errors"] = errors()
        found["agreed"] = shards.agreed("a test", torch.distributed.get_rank)
        lenses = ["accuracy", "collapse", "spectrum", "parts"]
        report = audit(network(), samples(), out=folder / "report", lenses=lenses)
        found["audit"] = {section.name: section.numbers for section in report.sections}
        compared = compare(network(), network(1), samples(), out=folder / "compare", options=SMALL)
        found["compare"] = {section.name: section.numbers for section in compared.sections}
        found["everywhere"] = shards.together("all", lambda: json.dumps(found["audit"]))
        rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
