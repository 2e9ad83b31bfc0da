"""Training loops of the neural-collapse recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.measure.collapse.metrics import collapse_metrics
from lineament.measure.collapse.profile import collapse
from lineament.recipes.kit import networks

# Weight decay of the feature layers and of the last one, as multiples of the baseline's.
SETTINGS = {
    "baseline": (1.0, 1.0),
    "2x last": (1.0, 2.0),
    "0 last": (1.0, 0.0),
    "2x features": (2.0, 1.0),
    "0 features": (0.0, 1.0),
}


def load_data(name: str, data_folder: str | None) -> Samples:
    """1,300 of scikit-learn's digits, or CIFAR's training images, standardised."""
    if name == "digits":
        digits = digit_images()
        return digits[np.random.default_rng(0).permutation(len(digits))[:1300]]
    found = read_photographs(name, data_folder=data_folder)
    return replace(found, inputs=Standardise(found.inputs)(found.inputs))


def network(kind: str, data: Samples, widths: tuple[int, ...], *, bias: bool, seed: int) -> nn.Module:
    """A freshly drawn network; PyTorch's default initialisation, from ``seed`` alone."""
    return networks.network(
        kind,
        data.inputs.shape[1:],
        len(data.classes),
        seed=seed,
        widths=widths if kind == "mlp" else None,
        head_bias=bias,
    )


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Half the squared distance to the one-hot label, or cross-entropy; means over the batch."""
    if name == "ce":
        return F.cross_entropy
    return lambda scores, y: (scores - F.one_hot(y, scores.shape[1])).square().sum(1).mean() / 2


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    groups: list[dict[str, Any]],
    epochs: int,
    milestones: list[int],
    lr: float,
    batch_size: int,
    seed: int,
    augment: bool = False,
    what: str = "training",
) -> Iterator[int]:
    """SGD with momentum 0.9, the rate divided by ten at each milestone; yields each epoch's number when it is done."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    generator = torch.Generator().manual_seed(seed)
    objective = loss_of(loss)
    for epoch in progress(range(1, epochs + 1), what):
        model.train()
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            rows = rows.to(x.device)
            batch = flip_and_crop(x[rows], generator) if augment else x[rows]
            value = objective(model(batch), y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
        yield epoch


def layerwise(
    data: Samples, *, width: int, layers: int, epochs: int, seed: int, device: str
) -> dict[str, Any]:
    """NC1 and NC1~ of the input and after each new hidden layer, which is trained with its own head on the frozen ones.

    SGD, rate 0.05, momentum 0.9, weight decay 5e-4, batches of 64, cross-entropy.
    """
    x, y = data.inputs.flatten(1).to(device), data.targets.to(device)
    found = {"nc1": [], "nc1_tilde": []}

    def measure() -> None:
        metrics = collapse_metrics(x, y, classes=len(data.classes))
        assert metrics.nc1 is not None
        found["nc1"].append(metrics.nc1)
        found["nc1_tilde"].append(metrics.nc1_tilde)

    measure()
    for layer in range(layers):
        model = network("mlp", Samples(x, y, data.classes), (width,), bias=True, seed=1000 * seed + layer)
        model.to(device)
        epochs_done = fit(
            model,
            x,
            y,
            loss="ce",
            groups=[{"params": list(model.parameters()), "weight_decay": 5e-4}],
            epochs=epochs,
            milestones=[],
            lr=0.05,
            batch_size=64,
            seed=1000 * seed + layer,
            what=f"layer {layer + 1}",
        )
        for _ in epochs_done:
            pass
        with torch.no_grad():
            x = model.get_submodule("features")(x)
        measure()
    return found


def weight_decay_run(
    data: Samples,
    *,
    kind: str,
    widths: tuple[int, ...],
    setting: str,
    loss: str,
    epochs: int,
    milestones: list[int],
    lr: float,
    weight_decay: float,
    batch_size: int,
    every: int,
    seed: int,
    device: str,
) -> dict[str, list[float]]:
    """One training of the weight-decay study: {"epoch", "nc1", "nc1_tilde", "nc2", "accuracy"}, the last entry at the end.

    The last layer has no bias under squared loss and one under cross-entropy, as in the paper.
    """
    model = network(kind, data, widths, bias=loss == "ce", seed=seed).to(device)
    features, last = SETTINGS[setting]
    head = list(model.get_submodule("head").parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    groups = [
        {"params": rest, "weight_decay": features * weight_decay},
        {"params": head, "weight_decay": last * weight_decay},
    ]
    x, y = data.to(device).pair
    batches = [(x[i : i + 500], y[i : i + 500]) for i in range(0, len(x), 500)]
    curve: dict[str, list[float]] = {
        name: [] for name in ("epoch", "nc1", "nc1_tilde", "nc2", "nc3", "nc4", "accuracy")
    }
    for epoch in fit(
        model,
        x,
        y,
        loss=loss,
        groups=groups,
        epochs=epochs,
        milestones=milestones,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        augment=data.inputs.shape[1] == 3,
        what=f"{loss}, {setting}, seed {seed}",
    ):
        if epoch % every and epoch != epochs:
            continue
        metrics = collapse(model, batches, classes=len(data.classes), head="head", keep_bytes=2**30)[
            "head:in"
        ]
        model.eval()
        with torch.no_grad():
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in batches)
        curve["epoch"].append(epoch)
        curve["accuracy"].append(right / len(x))
        for name in ("nc1", "nc1_tilde", "nc2", "nc3", "nc4"):
            value = getattr(metrics, name)
            curve[name].append(float("nan") if value is None else value)
    return curve
