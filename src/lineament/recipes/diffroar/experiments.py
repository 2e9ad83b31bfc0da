"""The stages of the diffroar recipe on BlockMNIST and on the simplified data: what is trained, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.data.blockmnist import block_mnist
from lineament.data.digits import digit_images
from lineament.data.samples import Samples
from lineament.data.signal_blocks import signal_blocks
from lineament.explain.faithfulness.feature_leakage import leakage, null_fraction, null_mass
from lineament.explain.faithfulness.input_gradients import attribution, input_gradient
from lineament.explain.faithfulness.retraining import DiffROAR, accuracy, diffroar
from lineament.recipes.diffroar.claims import Described, Simplified
from lineament.recipes.kit.networks import network
from lineament.train.attacks import PGD, robust_accuracy
from lineament.train.stacked import Training

PLACEMENTS: tuple[str, ...] = ("random", "top")
MODELS: tuple[str, ...] = ("standard", "robust")


class Demonstration:
    """BlockMNIST with its two placements, and the networks that learn it."""

    def __init__(self, config: Any):
        self.config = config
        self.data: dict[str, tuple[Samples, Samples]] = {}
        for placement in PLACEMENTS:
            both = []
            for split, count in (("train", config.train_images), ("test", config.test_images)):
                digits = digit_images(
                    config.data, split, count=count, data_folder=config.data_folder, seed=config.seed
                )
                self.source = digits.source
                made = block_mnist(
                    *digits.pair, placement=placement, seed=2 * config.seed + (split == "test")
                )
                both.append(made)
            self.data[placement] = both[0], both[1]
        # A digit of 8 x 8 pixels has about half the norm of one of 28 x 28.
        small = self.source != "MNIST"
        eps = config.eps if config.eps is not None else 1.0 if small else 2.0
        self.attack = PGD(norm="l2", eps=eps, step=eps / config.attack_steps, steps=config.attack_steps)

    def fresh(self) -> nn.Module:
        shape = self.data["random"][0].inputs.shape[1:]
        return network("mlp", shape, 10, seed=None, widths=self.config.widths)

    def training(self, epochs: int) -> Training:
        return Training(
            self.fresh, epochs=epochs, batch_size=self.config.batch_size, lr=self.config.lr, select="last"
        )

    def train(self, placement: str, kind: str) -> dict[str, Tensor]:
        train, _ = self.data[placement]
        training = self.training(self.config.epochs).against(self.attack if kind == "robust" else None)
        return dict(training(*train.pair, self.config.seed).state_dict())

    def model(self, weights: dict[str, Tensor]) -> nn.Module:
        model = self.fresh()
        model.load_state_dict(weights)
        return model.eval()

    def describe(self, model: nn.Module, placement: str) -> Described:
        """Accuracy, accuracy under attack, and how much of the gradient lies in the null blocks."""
        _, test = self.data[placement]
        gradient = input_gradient(model, test.inputs)
        attack = self.attack
        return Described(
            accuracy(model, *test.pair),
            robust_accuracy(model, *test.pair, attack),
            attack(model, *test.pair).to_dict()["no_gradient"],
            float(null_fraction(gradient, test.extras["null_mask"], 0.1).mean()),
            float(null_mass(gradient, test.extras["null_mask"]).mean()),
        )

    def judge(self, attribute: Any, fractions: Sequence[float], runs: int, fill: str = "zero") -> DiffROAR:
        train, test = self.data["random"]
        return diffroar(
            attribute,
            self.training(self.config.retrain_epochs),
            (*train.pair, *test.pair),
            fractions=fractions,
            seeds=[self.config.seed + 1 + k for k in range(runs)],
            fill=fill,
            jobs=self.config.jobs,
        )

    def shuffled(self) -> DiffROAR:
        """The control against leaking labels: a standard model of shuffled labels, judged on shuffled labels."""
        train, test = self.data["random"]
        generator = torch.Generator().manual_seed(self.config.seed)
        labels = [part.targets[torch.randperm(len(part), generator=generator)] for part in (train, test)]
        model = self.training(self.config.epochs)(train.inputs, labels[0], self.config.seed)
        return diffroar(
            attribution(model),
            self.training(self.config.retrain_epochs),
            (train.inputs, labels[0], test.inputs, labels[1]),
            fractions=(self.config.level,),
            seeds=(self.config.seed + 1,),
            fill="zero",
            chance_ok=True,
        )


def simplified(config: Any, name: str) -> Simplified:
    """One network on the simplified data: where its gradient lies, and how often it is right.

    ``linear`` and ``wide`` are trained by SGD, ``robust`` by Adam against a sign attack, with the signal in half of the blocks; ``everywhere`` is
    ``wide`` with the signal in any of them, as in the paper's first version.
    """
    blocks = config.blocks
    signals = blocks if name == "everywhere" else max(1, blocks // 2)
    data = signal_blocks(config.points, blocks=blocks, signals=signals, seed=config.seed)
    test = signal_blocks(1000, blocks=blocks, signals=signals, seed=config.seed + 1)
    attack = PGD(norm="linf", eps=0.35, step=0.35 / 4, steps=8, bounds=None) if name == "robust" else None
    widths = {"linear": (), "robust": (config.robust_width,)}.get(name, (config.wide,))
    training = Training(
        lambda: network("mlp", (blocks,), 2, seed=None, widths=widths),
        epochs=config.robust_epochs if name == "robust" else config.simple_epochs,
        batch_size=250,
        lr=5e-3,
        optimizer=None if name == "robust" else _sgd,
        attack=attack,
        select="last",
    )
    model = training(*data.pair, config.seed)
    gradient, own = input_gradient(model, test.inputs), test.extras["own"]
    sizes = gradient.reshape(*own.shape, -1).norm(dim=2)
    return Simplified(
        leakage(gradient, own, signals),
        accuracy(model, *test.pair),
        float(F.cosine_similarity(gradient, test.inputs, dim=1).abs().mean()),
        (sizes / sizes.sum(1, keepdim=True)).mean(0).tolist(),
    )


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
