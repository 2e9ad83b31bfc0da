"""What the shortcut-learning recipe trains and solves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.models import frozen
from lineament.data.footprint import footprint
from lineament.data.two_latents import TwoLatents, two_latents
from lineament.learn.useful.resampling import trainer, useful
from lineament.measure.shortcuts.latents import latent_bias
from lineament.measure.shortcuts.ntk import KERNELS, kernel_ridge
from lineament.measure.shortcuts.reliance import decisions, reliance
from lineament.measure.shortcuts.sweep import Trial, shortcut_sweep
from lineament.optim.sam import SAM
from lineament.recipes.kit.networks import network
from lineament.train.callbacks import Cosine, KeepBest, Validation
from lineament.train.loop import fit

# Hidden widths, activation, learning rate.
MODELS: dict[str, tuple[tuple[int, ...], str, float]] = {
    "linear": ((), "relu", 0.1),
    "relu x1": ((64,), "relu", 0.01),
    "tanh x1": ((64,), "tanh", 0.01),
    "relu x2": ((64,) * 2, "relu", 0.005),
    "relu x4": ((64,) * 4, "relu", 0.003),
    "tanh x4": ((64,) * 4, "tanh", 0.003),
    "relu x8": ((128,) * 8, "relu", 0.001),
    "tanh x8": ((128,) * 8, "tanh", 0.001),
}
_HELD = 2**32


@dataclass(frozen=True)
class KernelBias:
    """Mean bias of kernel ridge over seeds."""

    kernel: str
    ridge: float
    setting: str
    bias: float
    sd: float


@dataclass(frozen=True)
class Found:
    """All that the claims are judged by; ``closed`` are biases by setting, one a seed."""

    closed: dict[str, list[float]]
    trials: dict[str, list[Trial]]
    short: list[Trial]
    swapped: list[Trial]
    kernels: list[KernelBias]
    images: list[Trial]
    remedies: list[Trial]


def setting(rho: float, ratio: float) -> str:
    return f"ρ_s {rho:g}, ratio {ratio:g}"


def world(config: Any, rho: float, ratio: float, seed: int, *, swapped: bool = False) -> TwoLatents:
    amplification = (0.1, 0.1 * ratio) if swapped else (0.1 * ratio, 0.1)
    return two_latents(
        predictivity=(rho, config.core), correlation=config.correlation, amplification=amplification,
        dims=config.dims, seed=seed,
    )  # fmt: skip


def factory(config: Any, name: str) -> Callable[[], nn.Module]:
    widths, activation, _ = MODELS[name]
    return partial(network, "mlp", (config.dims,), 1, seed=None, widths=widths, activation=activation)


def sweep(config: Any, name: str, *, short: bool = False, swapped: bool = False) -> list[Trial]:
    """All settings and seeds of one architecture; ``short``: the linear control at a rate of 1e-3, which is too short."""
    largest = max(config.ratios)
    cells = [
        (rho, ratio)
        for rho in config.shortcut
        for ratio in ((largest,) if short or swapped else config.ratios)
    ]
    worlds = {
        setting(rho, ratio): partial(world, config, rho, ratio, swapped=swapped) for rho, ratio in cells
    }
    return shortcut_sweep(
        factory(config, name), {n: (lambda seed, make=make: make(seed=seed)) for n, make in worlds.items()},
        seeds=range(config.seeds), samples=config.samples, lr=1e-3 if short else MODELS[name][2],
        epochs=config.short_epochs if short else config.epochs,
    )  # fmt: skip


def closed_forms(config: Any) -> dict[str, list[float]]:
    """Bias of the least-squares solution on the same samples, one a seed."""
    found: dict[str, list[float]] = {}
    for rho in config.shortcut:
        for ratio in config.ratios:
            each = found[setting(rho, ratio)] = []
            for seed in range(config.seeds):
                made = world(config, rho, ratio, seed)
                train = made.draw(config.samples, seed=seed, dtype=torch.float64)
                goals = 2.0 * train.targets.double() - 1
                w = torch.linalg.lstsq(train.inputs, goals[:, None], driver="gelsd").solution[:, 0]
                each.append(_bias(made, lambda x, w=w: x @ w))
    return found


def kernel_biases(config: Any) -> list[KernelBias]:
    found = []
    for kernel in ("linear", "relu_ntk"):
        for ridge in config.ridges:
            for rho in config.shortcut:
                for ratio in config.ratios:
                    biases = []
                    for seed in range(config.kernel_seeds):
                        made = world(config, rho, ratio, seed)
                        train = made.draw(config.kernel_samples, seed=seed, dtype=torch.float64)
                        f = kernel_ridge(
                            train.inputs, 2.0 * train.targets.double() - 1, KERNELS[kernel], ridge=ridge
                        )
                        biases.append(_bias(made, f))
                    sd = statistics.stdev(biases) if len(biases) > 1 else 0.0
                    found.append(KernelBias(kernel, ridge, setting(rho, ratio), statistics.mean(biases), sd))
    return found


def footprint_trial(config: Any, factor: float, rho: float, seed: int) -> Trial:
    """One network on images whose disc is ``factor`` times as large as the square."""
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    made = footprint(
        factor, predictivity=(rho, config.core), correlation=config.correlation, size=config.footprint_size,
        base=config.footprint_base, seed=seed,
    )  # fmt: skip
    shown = TwoLatents(lambda z: 2 * made.embed(z) - 1, made.predictivity, made.correlation, made.name)
    shape = (3, config.footprint_size, config.footprint_size)
    net = network(config.footprint_network, shape, 1, seed=seed).to(device)
    make = lambda model: torch.optim.Adam(model.parameters(), lr=3e-3)  # noqa: E731
    return _trained(
        f"ρ_s {rho:g}, factor {factor:g}",
        net,
        shown,
        seed,
        config.footprint_samples,
        config.footprint_epochs,
        make,
        points=20,
    )


def remedy(config: Any, how: str, seed: int) -> Trial:
    """relu x1 at the largest ratio and predictivity, trained by Adam, by SAM around it, or on USEFUL's upsampled data."""
    rho, ratio = max(config.shortcut), max(config.ratios)
    made = world(config, rho, ratio, seed)
    net = network("mlp", (config.dims,), 1, seed=seed, widths=(64,), activation="relu")

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=MODELS["relu x1"][2])

    make = (lambda model: SAM(adam(model), rho=0.05, model=model)) if how == "sam" else adam
    return _trained(
        f"{how}, {setting(rho, ratio)}",
        net,
        made,
        seed,
        config.samples,
        config.epochs,
        make,
        upsampled=how == "useful",
    )


def squared(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The squared error of one score against labels 0 and 1 as ±1."""
    return F.mse_loss(z[:, 0], 2.0 * y.to(z.dtype) - 1, reduction=reduction)


def _trained(
    name: str, net: nn.Module, made: TwoLatents, seed: int, samples: int, epochs: int, optimizer: Any,
    *, points: int = 30, upsampled: bool = False,
) -> Trial:  # fmt: skip
    train, held = made.draw(samples, seed=seed), made.draw(1000, seed=seed + _HELD)
    best, validation = KeepBest(), Validation(held.pair, batch_size=500)
    last: dict[str, Any] = {}

    class Last:
        """The last epoch, before the best one is put back."""

        def on_end(self, run: Any) -> None:
            last.update({k: v.clone() for k, v in run.model.state_dict().items()})

    options: dict[str, Any] = {"optimizer": optimizer, "loss": squared, "seed": seed}
    if upsampled:
        plain = trainer(train.pair, **options)
        final = trainer(train.pair, callbacks=[Cosine(), validation, Last(), best], **options)
        useful(
            net, final, train.pair, epochs=epochs, separating=2, early_fit=plain, seed=seed, output="logits"
        )
    else:
        fit(net, train.pair, epochs=epochs, callbacks=[Cosine(), validation, Last(), best], **options)
    chosen = latent_bias(net, made, points=points)
    accuracy = _accuracy(net, held)
    net.load_state_dict(last)
    end = latent_bias(net, made, points=points)
    with frozen(net), torch.no_grad():
        device = next(net.parameters()).device
        losses = [
            float(squared(net(x.to(device)), y.to(device), "sum"))
            for x, y in zip(train.inputs.split(500), train.targets.split(500))
        ]
    return Trial(
        name, seed,
        chosen.bias, chosen.model.with_shortcut, chosen.model.with_core, accuracy,
        end.bias, end.model.with_shortcut, end.model.with_core, _accuracy(net, held),
        sum(losses) / len(train), end.best.value, made.optimal_accuracy,
    )  # fmt: skip


def _accuracy(net: nn.Module, held: Any) -> float:
    with frozen(net), torch.no_grad():
        device = next(net.parameters()).device
        scores = torch.cat([net(x.to(device)).cpu() for x in held.inputs.split(500)])
    return float((decisions(scores) == 2.0 * held.targets - 1).double().mean())


def _bias(made: TwoLatents, f: Callable[[Tensor], Tensor]) -> float:
    z = made.grid()
    return reliance(f(made.embed(z)), z).value - reliance(z @ made.optimal_weights, z).value


def by_setting(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.setting, []).append(trial)
    return found


def mean(trials: Sequence[Trial], name: str = "bias") -> float:
    return statistics.mean(getattr(t, name) for t in trials)


def summary(trials: Sequence[Trial]) -> list[list[Any]]:
    """A row a setting: means over seeds, and the deviations of the biases."""
    rows = []
    for name, each in by_setting(trials).items():
        sd = [
            statistics.stdev(getattr(t, what) for t in each) if len(each) > 1 else None
            for what in ("bias", "last_bias")
        ]
        rows.append(
            [
                name, len(each), mean(each), sd[0], mean(each, "last_bias"), sd[1],
                mean(each, "with_shortcut"), mean(each, "with_core"), mean(each, "accuracy"), each[0].optimal_accuracy,
                each[0].optimal, mean(each, "loss"),
            ]
        )  # fmt: skip
    return rows
