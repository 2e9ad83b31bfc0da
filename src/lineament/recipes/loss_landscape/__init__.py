"""Loss landscapes and the Hessian's criteria: do they fall with training, follow accuracy under shift, and when does a plane mislead?

Gabdullin 2024, arXiv 2412.10146. The paper judges ImageNet networks; ``quick`` and ``small`` are scikit-learn's digits with a perceptron with
and without batch norm, ``paper`` is ResNet-18 on CIFAR-10. The criteria take true labels, so the plain loss on the same data stands beside them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.curvature.matrices import hessian
from lineament.core.models import frozen
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.measure.landscape.axes import hessian_axes, random_axes
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import line, plane
from lineament.measure.landscape.results import Plane
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import few_threads
from lineament.recipes.loss_landscape.claims import Measured, Shifted, Spectrum, claims, correlation, rise
from lineament.recipes.loss_landscape.figures import draw_all
from lineament.report.outcome import Outcome, Table
from lineament.train.loop import fit

SLUG = "loss-landscape"
TITLE = "Loss Landscapes and Hessian Analysis"
NETWORKS = ("plain", "batch norm")
# Gaussian noise of a standard deviation (images span 1), rotation by degrees, translation by pixels of an image of side 8.
SHIFTS = {
    "noise": (0.0, 0.1, 0.2, 0.3, 0.5),
    "rotation": (10.0, 20.0, 30.0, 45.0),
    "translation": (0.5, 1.0, 1.5, 2.0),
}


@dataclass(frozen=True)
class Config:
    """One run: the data, the training, the spectra (Lanczos steps and probes), the planes, and how many networks at a time."""

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
        quick={"jobs": 2},
        small={"seeds": (0, 1), "probes": 12, "grid": 41, "jobs": 2},
        paper={
            "data": "cifar10", "network": "resnet18", "seeds": (0, 1, 2), "epochs": 60, "lr": 1e-3, "batch_size": 128,
            "lanczos": 100, "probes": 3, "grid": 41,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished network."""
    train, test = load_data(config)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = train.to(device), test.to(device)
    names = [(kind, seed) for kind in NETWORKS for seed in config.seeds]
    with few_threads(train.inputs, device):
        found = Stages(out, config).each(
            "{0[0]}, seed {0[1]}",
            names,
            lambda name: measure(config, train, test, *name),
            Measured,
            jobs=config.jobs,
        )
    runs = {f"{kind}, seed {seed}": measured for (kind, seed), measured in found.items()}
    tables, figures = _tables(runs), draw_all(runs, out)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims(runs), tables, figures)


def load_data(config: Config) -> tuple[Samples, Samples]:
    """Digits split 1,000 to 797, or CIFAR-10's training images but the last ``held``, and these."""
    if config.data == "digits":
        digits = digit_images()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        return digits[order[:1000]], digits[order[1000:]]
    found = read_photographs(config.data, data_folder=config.data_folder)
    found = replace(found, inputs=Standardise(found.inputs)(found.inputs))
    return found[: -config.held], found[-config.held :]


def fresh(config: Config, data: Samples, kind: str, seed: int) -> nn.Module:
    """An untrained network of a kind; the perceptron has two hidden layers of 32."""
    widths = (32, 32) if config.network == "mlp" else None
    shape, classes = data.inputs.shape[1:], len(data.classes)
    made = network(config.network, shape, classes, seed=seed, widths=widths, norm=kind == "batch norm")
    return made.to(data.inputs.device)


def measure(config: Config, train: Samples, test: Samples, kind: str, seed: int) -> Measured:
    """Everything that is measured of one network."""
    # Spectra in float64 where the network is small: K counts tiny eigenvalues by their sign.
    precision = torch.float64 if config.network == "mlp" else torch.float32
    start, net = fresh(config, train, kind, seed), fresh(config, train, kind, seed)
    adam = torch.optim.Adam(net.parameters(), lr=config.lr)
    fit(net, train, optimizer=adam, epochs=config.epochs, batch_size=config.batch_size, seed=seed)
    start, net = start.to(precision).eval(), net.to(precision).eval()
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: config.held]
    seen, curves, shifts = train[rows.to(train.inputs.device)], {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LandscapeWarning)  # that planes mislead here is what is measured
        init, curves["init"] = _spectrum(start, seen.inputs.to(precision), seen.targets, config, seed)
        trained, curves["trained"] = _spectrum(net, seen.inputs.to(precision), seen.targets, config, seed)
        for number, (shift, size) in enumerate((s, size) for s, sizes in SHIFTS.items() for size in sizes):
            moved = shifted(test.inputs.to(precision), shift, size, 1000 * seed + number)
            shifts.append(Shifted(shift, size, _spectrum(net, moved, test.targets, config, seed)[0]))
        return Measured(init, trained, curves, shifts, *_around(net, seen, kind, config, seed))


def shifted(images: Tensor, kind: str, size: float, seed: int) -> Tensor:
    """The images with noise, rotated, or moved; what comes in from outside is zero."""
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return images + size * torch.randn(images.shape, generator=generator).to(images)
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    angle = math.radians(size) if kind == "rotation" else 0.0
    theta[:, 0, 0] = theta[:, 1, 1] = math.cos(angle)
    theta[:, 0, 1], theta[:, 1, 0] = -math.sin(angle), math.sin(angle)
    if kind == "translation":
        theta[:, 0, 2] = -2 * size / 8
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    # All digits at once: what small products cost is mostly the calls.
    size = 512 if inputs[0].numel() > 1000 else 1024
    return list(zip(inputs.split(size), targets.split(size)))


def _spectrum(
    net: nn.Module, inputs: Tensor, targets: Tensor, config: Config, seed: int
) -> tuple[Spectrum, tuple[Tensor, Tensor]]:
    batches = _batches(inputs, targets)
    found = hessian_criteria(
        net, F.cross_entropy, batches, steps=config.lanczos, probes=config.probes, seed=seed
    )
    with frozen(net), torch.no_grad():
        scores = torch.cat([net(x) for x, _ in batches])
    spectrum = Spectrum(
        re=float(found.re.mean()),
        k=float(found.k.mean()),
        k_spread=float(found.k.std()) if config.probes > 1 else math.nan,
        top=float(found.density.nodes.max()),
        trace=found.trace,
        loss=float(F.cross_entropy(scores, targets)),
        accuracy=float((scores.argmax(1) == targets).double().mean()),
    )
    return spectrum, found.density.curve()


def _around(
    net: nn.Module, seen: Samples, kind: str, config: Config, seed: int
) -> tuple[dict[str, Plane], float, float]:
    """Planes by axes and batch-norm mode, and by how much a line's curvature is off its eigenvalue, near and far."""
    batches = _batches(seen.inputs.to(next(net.parameters()).dtype), seen.targets)
    steep = hessian_axes(hessian(net, F.cross_entropy, batches), tol=1e-6, seed=seed)
    top = steep[0].info["eigenvalue"]
    chosen = {
        "random": (random_axes(net, seed=seed), 1.0),
        "hessian": (steep, 2 / math.sqrt(max(top, 1e-12))),
    }
    planes = {
        f"{name}, {mode}": plane(
            net, F.cross_entropy, batches, axes, dist=dist, steps=config.grid, batchnorm=mode
        )
        for name, (axes, dist) in chosen.items()
        for mode in (("eval", "batch") if kind == "batch norm" else ("eval",))
    }
    # Nearer than the next kink of a ReLU, which autograd's Hessian does not see; float32 cannot resolve that.
    fine = 1e-6 if steep[0].vector.dtype == torch.float64 else 1e-2
    near, far = (
        abs(line(net, F.cross_entropy, batches, steep[0], dist=h, steps=3).curvature() / top - 1)
        for h in (fine, 1e-2)
    )
    return planes, near, far


def _tables(runs: dict[str, Measured]) -> list[Table]:
    spectra = [
        (name, when, *(round(float(v), 5) for v in (found.re, found.k, found.top, found.trace, found.accuracy)))
        for name, run in runs.items()
        for when, found in (("init", run.init), ("trained", run.trained))
    ]  # fmt: skip
    keys = ("re", "k", "loss", "top", "trace")
    ranks = [(name, *(round(correlation(run, key), 3) for key in keys)) for name, run in runs.items()]
    shifts = [
        (name, f"{p.shift} {p.size:g}", *(round(getattr(p.spectrum, k), 4) for k in ("accuracy", "re", "k", "loss")))
        for name, run in runs.items()
        for p in run.shifts
    ]  # fmt: skip
    planes = [
        (name, which, round(found.centre, 5), round(rise(found), 5))
        for name, run in runs.items()
        for which, found in run.planes.items()
    ]
    plain = "Rank correlation with accuracy over the shifts (the loss itself is the plain baseline)"
    criteria, numbers = (
        ("network", "when", "r_e", "K_H0.5"),
        ("network", "shift", "accuracy", "r_e", "K_H0.5", "loss"),
    )
    return [
        Table("Spectra on training data", (*criteria, "largest", "trace", "accuracy"), spectra),
        Table(plain, ("network", "r_e", "K_H0.5", "loss", "largest eigenvalue", "trace"), ranks),
        Table("Planes: mean rise of the loss", ("network", "axes, batch norm", "loss in the middle", "mean rise"), planes),
        Table("Every shifted test set", numbers, shifts),
    ]  # fmt: skip
