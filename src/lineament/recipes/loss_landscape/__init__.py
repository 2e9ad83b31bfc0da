"""Loss landscapes and the Hessian's criteria: do they fall with training, follow accuracy under shift, and when does a plane mislead?

Gabdullin 2024, arXiv 2412.10146. The paper judges ImageNet networks; ``quick`` and ``small`` are scikit-learn's digits with a perceptron with
and without batch norm, ``paper`` is ResNet-18 on CIFAR-10. The criteria take true labels, so the plain loss on the same data stands beside them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from lineament.core.checkpoint import Checkpoint
from lineament.core.curvature.matrices import hessian
from lineament.core.models import frozen
from lineament.measure.landscape.axes import hessian_axes, random_axes
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import line, plane
from lineament.recipes.kit.presets import presets
from lineament.recipes.loss_landscape.figures import draw_all
from lineament.recipes.loss_landscape.task import NETWORKS, SHIFTS, Task, shifted, task, training
from lineament.report.outcome import Claim, Outcome, Table

SLUG = "loss-landscape"
TITLE = "Loss Landscapes and Hessian Analysis"


@dataclass(frozen=True)
class Config:
    """One run: the data, the training, the spectra (Lanczos steps and probes), and the planes."""

    data: Literal["digits", "cifar10"] = "digits"
    data_folder: str | None = None
    network: Literal["mlp", "resnet18"] = "mlp"
    device: str = "auto"
    held: int = 2048
    seeds: tuple[int, ...] = (0,)
    epochs: int = 30
    lr: float = 3e-3
    batch_size: int = 100
    lanczos: int = 80
    probes: int = 6
    grid: int = 21
    jobs: int = 1

    preset: str = presets(
        quick={},
        small={"seeds": (0, 1), "probes": 12, "grid": 41},
        paper={
            "data": "cifar10",
            "network": "resnet18",
            "seeds": (0, 1, 2),
            "epochs": 60,
            "lr": 1e-3,
            "batch_size": 128,
            "lanczos": 100,
            "probes": 3,
            "grid": 41,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished network."""
    data = task(config.data, config.data_folder, config.held)
    stages = Checkpoint(out / ".stages", asdict(config))
    runs: dict[str, dict[str, Any]] = {}
    for kind in NETWORKS:
        for seed in config.seeds:
            runs[f"{kind}, seed {seed}"] = stages.stage(
                f"{kind}, seed {seed}", lambda kind=kind, seed=seed: _one(config, data, kind, seed)
            )
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims(runs), _tables(runs), draw_all(runs, out)
    )


def _one(config: Config, data: Task, kind: str, seed: int) -> dict[str, Any]:
    """Everything that is measured of one network."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Spectra in float64 where the network is small: K counts tiny eigenvalues by their sign.
    precision = torch.float64 if config.network == "mlp" else torch.float32
    x, y = (t.to(device) for t in data.train)
    fit = training(
        kind, config.network, data, epochs=config.epochs, lr=config.lr, batch_size=config.batch_size
    )
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: config.held].to(device)
    seen = [(a, b) for a, b in zip(x[rows].to(precision).split(512), y[rows].split(512))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LandscapeWarning)  # that planes mislead here is what is measured
        start = fit.fresh(seed).to(device).to(precision).eval()
        found: dict[str, Any] = {"curves": {}}
        net = fit(x, y, seed).to(precision)
        for when, each in (("init", start), ("trained", net)):
            found[when], found["curves"][when] = _spectrum(each, seen, config, seed)
        test = data.test[0].to(device).to(precision), data.test[1].to(device)
        found["shifts"] = []
        for number, (shift, size) in enumerate(SHIFTS):
            moved = shifted(test[0], shift, size, 1000 * seed + number)
            batches = list(zip(moved.split(512), test[1].split(512)))
            numbers, _ = _spectrum(net, batches, config, seed)
            found["shifts"].append({"shift": shift, "size": size, **numbers})
        found["planes"], found["curvature"] = _around(net, seen, kind, config, seed)
    return found


def _spectrum(
    net: nn.Module, batches: list[Any], config: Config, seed: int
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    found = hessian_criteria(
        net, F.cross_entropy, batches, steps=config.lanczos, probes=config.probes, seed=seed
    )
    with frozen(net), torch.no_grad():
        scores = torch.cat([net(x) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    numbers = {
        "re": float(found.re.mean()),
        "k": float(found.k.mean()),
        "k_spread": float(found.k.std()) if config.probes > 1 else math.nan,
        "top": float(found.density.nodes.max()),
        "trace": found.trace,
        "loss": float(F.cross_entropy(scores, targets)),
        "accuracy": float((scores.argmax(1) == targets).double().mean()),
    }
    return numbers, found.density.curve()


def _around(
    net: nn.Module, batches: list[Any], kind: str, config: Config, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Planes by axes and batch-norm mode, and by how much a line's curvature is off its eigenvalue."""
    options: dict[str, Any] = {"steps": config.grid, "jobs": config.jobs}
    steep = hessian_axes(hessian(net, F.cross_entropy, batches), tol=1e-6, seed=seed)
    top = steep[0].info["eigenvalue"]
    chosen = {
        "random": (random_axes(net, seed=seed), 1.0),
        "hessian": (steep, 2 / math.sqrt(max(top, 1e-12))),
    }
    planes: dict[str, Any] = {}
    for name, (axes, dist) in chosen.items():
        for mode in ("eval", "batch") if kind == "batch norm" else ("eval",):
            found = plane(net, F.cross_entropy, batches, axes, dist=dist, batchnorm=mode, **options)
            rise = float(found.loss.mean()) - found.centre
            planes[f"{name}, {mode}"] = {
                "a": found.a, "b": found.b, "loss": found.loss, "labels": found.labels, "rise": rise, "centre": found.centre,
            }  # fmt: skip
    # Nearer than the next kink of a ReLU, which autograd's Hessian does not see; float32 cannot resolve that.
    fine = 1e-6 if steep[0].vector.dtype == torch.float64 else 1e-2
    off = [
        abs(line(net, F.cross_entropy, batches, steep[0], dist=h, steps=3).curvature() / top - 1)
        for h in (fine, 1e-2)
    ]
    return planes, {"near": off[0], "far": off[1]}


def claims(runs: dict[str, dict[str, Any]]) -> list[Claim]:
    """Predicates, written before the first run: r_e falls over 50 times and K at least 4 times in every network; rank correlation with
    accuracy at most -0.8 in every network; with batch norm, random planes change more with its mode than Hessian planes do."""
    found = []
    for key, name, least in (("re", "r_e", 50.0), ("k", "K_H0.5", 4.0)):
        falls = [run["init"][key] / max(run["trained"][key], 1e-300) for run in runs.values()]
        paper = "0.861 to 0.028 (LeNet, MNIST)" if key == "re" else "1.033 to 0.222 (LeNet, MNIST)"
        observed = "; ".join(f"{r['init'][key]:.3g} to {r['trained'][key]:.2g}" for r in runs.values())
        holds = min(falls) >= least
        worst = min(runs, key=lambda name: runs[name]["init"][key] / max(runs[name]["trained"][key], 1e-300))
        ended = f"{worst} falls {min(falls):.3g} times; its training ended at an accuracy of {runs[worst]['trained']['accuracy']:.3f}"
        reason = "" if holds else ended
        found.append(
            Claim(f"training lowers {name} at least {least:g} times", paper, observed, holds, reason)
        )
    for key, name in (("re", "r_e"), ("k", "K_H0.5")):
        rho = [correlation(run, key) for run in runs.values()]
        holds = max(rho) <= -0.8
        observed = "rank correlation " + ", ".join(f"{r:.2f}" for r in rho)
        reason = (
            "" if holds else "over the thirteen shifts the order is not kept closely enough in every network"
        )
        found.append(
            Claim(
                f"{name} rises as accuracy falls under shift",
                "changes go together (ImageNet)",
                observed,
                holds,
                reason,
            )
        )
    pairs = {}
    for name, run in runs.items():
        if "random, batch" in run["planes"]:
            pairs[name] = [_ratio(run["planes"], axes) for axes in ("random", "hessian")]
    holds = all(random > steep for random, steep in pairs.values())
    observed = "; ".join(
        f"{math.exp(random):.3g} against {math.exp(steep):.3g} times" for random, steep in pairs.values()
    )
    reason = (
        ""
        if holds
        else "the steepest directions under running statistics are largely those that a batch's own statistics undo"
    )
    found.append(
        Claim("with batch norm's mode, random planes change more than Hessian planes", "random planes can mislead, Hessian axes are safer", observed, holds, reason)
    )  # fmt: skip
    near, far = (max(run["curvature"][at] for run in runs.values()) for at in ("near", "far"))
    observed = (
        f"off by at most {100 * near:.2g} % (a hundredth away, across the ReLUs' kinks: {100 * far:.2g} %)"
    )
    reason = (
        ""
        if near < 0.01
        else "the second difference crosses kinks of ReLUs, which autograd's Hessian does not see"
    )
    found.append(
        Claim(
            "control: a line's curvature along an eigenvector is its eigenvalue",
            "to 1 %",
            observed,
            near < 0.01,
            reason,
        )
    )
    spread = max(run["trained"]["k_spread"] for run in runs.values())
    reason = "" if spread < 0.1 else "take more probes"
    found.append(
        Claim(
            "control: K_H0.5 hardly depends on the probe",
            "spread 0.005 to 0.03",
            f"at most {spread:.3g}",
            spread < 0.1,
            reason,
        )
    )
    return found


def correlation(run: dict[str, Any], key: str) -> float:
    """Spearman's rank correlation of a quantity with accuracy over the shifted test sets."""
    points = run["shifts"]
    return float(spearmanr([p["accuracy"] for p in points], [p[key] for p in points])[0])  # pyright: ignore


def _ratio(planes: dict[str, Any], axes: str) -> float:
    """|log| of how many times the loss rises more, on average over the plane, under one batch-norm mode than the other."""
    one, other = (planes[f"{axes}, {mode}"]["rise"] for mode in ("batch", "eval"))
    return abs(math.log(one / other)) if one > 0 and other > 0 else math.inf


def _tables(runs: dict[str, dict[str, Any]]) -> list[Table]:
    spectra = [
        (name, when, *(round(float(run[when][k]), 5) for k in ("re", "k", "top", "trace", "accuracy")))
        for name, run in runs.items()
        for when in ("init", "trained")
    ]
    keys = ("re", "k", "loss", "top", "trace")
    ranks = [(name, *(round(correlation(run, key), 3) for key in keys)) for name, run in runs.items()]
    shifts = [
        (
            name,
            f"{p['shift']} {p['size']:g}",
            *(round(float(p[k]), 4) for k in ("accuracy", "re", "k", "loss")),
        )
        for name, run in runs.items()
        for p in run["shifts"]
    ]
    planes = [
        (name, which, round(p["centre"], 5), round(p["rise"], 5))
        for name, run in runs.items()
        for which, p in run["planes"].items()
    ]
    return [
        Table(
            "Spectra on training data",
            ("network", "when", "r_e", "K_H0.5", "greatest", "trace", "accuracy"),
            spectra,
        ),
        Table(
            "Rank correlation with accuracy over the shifts (the loss itself is the plain baseline)",
            ("network", "r_e", "K_H0.5", "loss", "greatest eigenvalue", "trace"),
            ranks,
        ),
        Table(
            "Planes: mean rise of the loss",
            ("network", "axes, batch norm", "loss in the middle", "mean rise"),
            planes,
        ),
        Table("Every shifted test set", ("network", "shift", "accuracy", "r_e", "K_H0.5", "loss"), shifts),
    ]
