"""DiffROAR on photographs: CIFAR-10 from a folder of the user's, or any images by class, standard and robust ResNets or perceptrons.

The paper's later version has perceptrons with two hidden layers on SVHN and Fashion-MNIST: ``--dataset images --network mlp`` with those images.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.data.photographs import read_photographs
from lineament.explain.faithfulness.input_gradients import attribution
from lineament.explain.faithfulness.retraining import DiffROAR, accuracy, diffroar
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Claim, Table
from lineament.train.attacks import PGD, robust_accuracy
from lineament.train.stacked import Training


class Normalised(nn.Module):
    """A network behind the normalisation of its data, so that attacks are measured in pixels of [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.deviation)


def parsed(text: str) -> PGD:
    """``"l2 0.5"`` or ``"linf 8/255"`` as an attack of seven steps.

    >>> parsed("linf 8/255").eps == 8 / 255
    True
    """
    found = re.fullmatch(r"(l2|linf) ([0-9./]+)", text.strip())
    require(found is not None, f"attacks: got {text!r}, expected 'l2 SIZE' or 'linf SIZE', say 'linf 8/255'")
    assert found is not None
    eps = float(Fraction(found[2]))
    return PGD(norm=found[1], eps=eps, step=2.5 * eps / 7, steps=7)


def evaluation(attack: PGD) -> PGD:
    """The attack of the official evaluation, of the same size: five steps of a half (l2), eight of a quarter (linf).

    >>> evaluation(parsed("l2 0.5")).step, evaluation(parsed("linf 8/255")).steps
    (0.25, 8)
    """
    share, steps = (0.5, 5) if attack.norm == "l2" else (0.25, 8)
    return replace(attack, step=share * attack.eps, steps=steps)


def read(config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Training and test images in [0, 1] with labels, and the number of classes; a fifth is held out for testing."""
    if config.dataset == "cifar10":
        held = read_photographs("cifar10", data_folder=config.data_folder)
        x = held.inputs.float() / 255
    else:
        from lineament.load.data import load_data

        require(
            config.data_folder is not None,
            "data_folder: dataset 'images' needs a folder with one folder a class",
        )
        held = load_data(
            config.data_folder, samples=10**9, seed=config.seed, image_size=(config.image_size,) * 2
        )
        x = held.inputs.float() / (255 if held.inputs.dtype == torch.uint8 else 1)
        x = x.movedim(-1, 1) if x.shape[-1] in (1, 3) and x.ndim == 4 else x[:, None] if x.ndim == 3 else x
    y, classes = held.targets, len(held.classes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(config.seed))
    cut = len(order) - len(order) // 5
    first, second = order[:cut], order[cut:]
    return x[first], y[first], x[second], y[second], classes


def on_photographs(config: Any, stages: Stages) -> tuple[list[Claim], list[Table], dict[str, DiffROAR]]:
    """Standard and robust models, their accuracy under attack, and the DiffROAR of their gradients."""
    attacks = {text: parsed(text) for text in config.attacks}
    x, y, x_test, y_test, classes = read(config)
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else torch.device(config.device)
    )
    x, y, x_test, y_test = (v.to(device) for v in (x, y, x_test, y_test))
    mean, deviation = x.mean((0, 2, 3), keepdim=True).cpu(), x.std((0, 2, 3), keepdim=True).cpu()

    def fresh() -> nn.Module:
        wide = config.widths if config.network == "mlp" else config.network_width
        return Normalised(
            network(config.network, tuple(x.shape[1:]), classes, seed=None, widths=wide), mean, deviation
        )

    training = Training(
        fresh,
        epochs=config.photograph_epochs,
        batch_size=config.batch_size,
        optimizer=lambda net: torch.optim.SGD(
            net.parameters(), lr=config.photograph_lr, momentum=0.9, weight_decay=5e-4, fused=True
        ),
        schedule=lambda done: 0.1 ** int(3 * done),
        at_once=1,
    )
    judged, rows = {}, []
    for name in ("standard", *attacks):
        weights = stages(
            f"train {name}",
            lambda n=name: dict(training.against(attacks.get(n))(x, y, config.seed).cpu().state_dict()),
            dict[str, Tensor],
        )
        model = fresh()
        model.load_state_dict(weights)
        model.to(device).eval()
        attacked = [robust_accuracy(model, x_test, y_test, evaluation(attack)) for attack in attacks.values()]
        rows.append([name, accuracy(model, x_test, y_test), *attacked])
        judged[name] = stages(
            f"diffroar {name}",
            lambda m=model: diffroar(
                attribution(m), training, (x, y, x_test, y_test), fractions=config.fractions, seeds=range(1, config.runs + 1), jobs=config.jobs
            ),
            DiffROAR,
        )  # fmt: skip
    tables = [
        Table("Accuracy, and under each attack", ["model", "accuracy", *attacks], rows),
        Table(
            "DiffROAR by kept share",
            ["model", *(f"{100 * f:g} %" for f in config.fractions)],
            [[name, *each.mean.tolist()] for name, each in judged.items()],
        ),
    ]
    k, standard = config.level, judged["standard"]
    robust = {name: each for name, each in judged.items() if name != "standard"}
    claims = [
        Claim(
            f"Standard training: DiffROAR is near zero or negative (at {100 * k:g} % kept, at most 0.05)",
            "CIFAR-10 -0.048, ImageNet-10 -0.046 at 10 % kept",
            f"{standard.at(k):+.3f}",
            standard.at(k) <= 0.05,
        ),
        Claim(
            f"Adversarial training: DiffROAR is clearly positive (at {100 * k:g} % kept, at least 0.05 for every attack)",
            "CIFAR-10 l2 0.25: .088, l2 0.5: .137, linf 8/255: .228; ImageNet-10 .069 to .111",
            "; ".join(f"{name} {each.at(k):+.3f}" for name, each in robust.items()),
            all(each.at(k) >= 0.05 for each in robust.values()),
        ),
    ]
    return claims, tables, judged
