"""Planted features: directions that decide a label and stronger ones that do not, a network that learned the label, and dictionaries of its input.

The specification's demonstration A: d = 64; 192 random unit directions, each on with probability 0.04; the first half functional, of magnitude U(0.3, 0.6), the
other a nuisance, of magnitude U(1, 2); the label is drawn from softmax(6 Wᵀ a) of the functional magnitudes a.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.dictionaries.autoencoders import Neurons, TopK
from lineament.dictionaries.effects import steering_effects
from lineament.dictionaries.evaluation import Evaluation, evaluate
from lineament.dictionaries.factorisations import pca
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.training import TrainingOptions, train_dictionary
from lineament.recipes.kit.networks import network
from lineament.train.loop import fit

D, FEATURES, CLASSES, SITE = 64, 192, 8, "features.0"
TOPK, OURS, LABELS = "TopK", "g-SAE", "g-SAE, true labels"
INFERENCE, SHUFFLED, RANDOM = (
    "TopK, gradient at inference only",
    "g-SAE, gradients shuffled",
    "g-SAE, random directions",
)
FROZEN, LONGER = "TopK, random decoder frozen", "TopK, 1.5 times the steps"


@dataclass(frozen=True)
class Measured:
    """One dictionary in one mode. ``functional`` and ``nuisance``: how many of the planted atoms it found (cosine of 0.9 or more)."""

    name: str
    mode: str
    kl: float
    kl_error: float
    kl_random: float
    recovered: float
    fvu: float
    dead: float
    l0: float
    functional: float
    nuisance: float
    steering: float


@dataclass(frozen=True)
class World:
    atoms: Tensor
    weights: Tensor

    @classmethod
    def drawn(cls, seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(FEATURES, D, generator=generator)
        weights = torch.randn(FEATURES // 2, CLASSES, generator=generator)
        return cls(atoms / atoms.norm(dim=1, keepdim=True), weights)

    def samples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Activations and labels."""
        generator = torch.Generator().manual_seed(seed)
        half = FEATURES // 2
        on = torch.rand(count, FEATURES, generator=generator) < 0.04
        size = torch.rand(count, FEATURES, generator=generator)
        a = on * torch.cat([0.3 + 0.3 * size[:, :half], 1 + size[:, half:]], 1)
        chances = (6 * a[:, :half] @ self.weights).softmax(1)
        return a @ self.atoms, torch.multinomial(chances, 1, generator=generator).squeeze(1)


def planted(config: Any, seed: int) -> list[Measured]:
    """Every dictionary of one seed, in the modes that it has."""
    world = World.drawn(seed)
    data, test = world.samples(config.rows, 1000 + seed), world.samples(config.test_rows, 2000 + seed)
    model = network("mlp", (D,), CLASSES, seed=seed, widths=(256, 256), activation="gelu")
    fit(
        model, data, optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=1e-3), batch_size=512,
        epochs=config.host_epochs, seed=seed,
    )  # fmt: skip
    model.eval()
    options = TrainingOptions(dead_tokens=config.batch_size * 50, clip=None)
    plans: dict[str, tuple[float, TrainingOptions]] = {
        TOPK: (0.0, options),
        OURS: (1.0, options),
        **{front(beta): (beta, options) for beta in config.betas},
    }
    for name in config.controls:
        plans |= {
            "shuffled": {SHUFFLED: (1.0, changed(options, control="shuffled"))},
            "random": {RANDOM: (1.0, changed(options, control="random"))},
            "frozen": {FROZEN: (0.0, changed(options, frozen=("W_dec",)))},
        }.get(name, {})

    def trained(plans: dict[str, tuple[float, TrainingOptions]], gradient: str, steps: int) -> dict[str, Any]:
        made = [
            TopK(D, config.width, k=config.k, selection=Selection(beta=beta)) for beta, _ in plans.values()
        ]
        found = train_dictionary(
            model, data, site=SITE, dictionary=made, tokens=steps * config.batch_size, batch_size=config.batch_size,
            learning_rate=2e-3, gradient=gradient, seed=seed, options=[each for _, each in plans.values()],
        )  # fmt: skip
        return {name: each.dictionary for name, each in zip(plans, found)}

    found = trained(plans, "sampled", config.steps)
    if "labels" in config.controls:
        found |= trained({LABELS: (1.0, options)}, "labels", config.steps)
    if "longer" in config.controls:
        found |= trained({LONGER: (0.0, options)}, "sampled", config.steps * 3 // 2)
    late = copy.deepcopy(found[TOPK])
    late.selection = Selection(beta=1.0, influence_scale=found[OURS].selection.influence_scale)
    by_gradient = {name: each for name, each in found.items() if each.selection.beta > 0} | {INFERENCE: late}
    others = {"neurons": Neurons(D, k=config.k, site=SITE), "PCA": pca(data[0][:20_000], config.k, site=SITE)}
    contexts = test[0][: config.contexts]
    # In which mode codes are chosen does not matter to what an atom does; the late one has TopK's atoms.
    steering = {
        name: float(steering_effects(model, each, contexts, latents=range(len(each.atoms))).kl.mean())
        for name, each in {**found, **others}.items()
    }
    steering[INFERENCE] = steering[TOPK]
    measured = []
    for mode, members in (("activation", {**found, **others}), ("gradient", by_gradient)):
        results = evaluate(model, list(members.values()), test, mode=mode, site=SITE)
        for (name, each), result in zip(members.items(), results):
            measured.append(_measured(name, result, each, world, steering[name]))
    return measured


def front(beta: float) -> str:
    """The name of a dictionary on the front over beta."""
    return f"g-SAE, beta = {beta:g}"


def changed(options: TrainingOptions, **changes: Any) -> TrainingOptions:
    return TrainingOptions(**{**asdict(options), **changes})


def _measured(name: str, result: Evaluation, dictionary: Any, world: World, steering: float) -> Measured:
    unit = dictionary.atoms / dictionary.atoms.norm(dim=1, keepdim=True).clamp_min(1e-12)
    there = ((world.atoms @ unit.T).abs().amax(1) >= 0.9).double()
    half = FEATURES // 2
    return Measured(
        name, result.mode, result.kl, result.errors["kl"], result.kl_random, result.recovered_mean, result.fvu, result.dead,
        result.l0, float(there[:half].mean()), float(there[half:].mean()), steering,
    )  # fmt: skip
