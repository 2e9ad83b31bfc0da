"""Pictures that are chosen for a set: at random, or by features of a network that is trained on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.batching import chunked
from lineament.core.models import frozen
from lineament.core.sites.activations import capture
from lineament.learn.condensation.coresets import herding, k_centers, k_means
from lineament.learn.condensation.learning import drawn_from

# Training of the network whose features count.
EPOCHS, RATE, BATCH = 10, 0.01, 128
CHOSEN = {"herding": herding, "k_center": k_centers, "k_means": k_means}


def chosen_rows(
    method: str, inputs: Callable[[Tensor], Tensor], targets: Tensor, per_class: int, make: Callable[[int], nn.Module], seed: int
) -> Tensor:  # fmt: skip
    """Rows of the chosen pictures, class by class: ``"random"``, or a name of :data:`CHOSEN`.

    Args:
        inputs: gives the normalised pictures of some rows. make: a network from a number.
    """
    generator = drawn_from(seed, 2)
    rows = [(targets == c).nonzero()[:, 0].cpu() for c in range(int(targets.max()) + 1)]
    if method == "random":
        return torch.cat([r[torch.randperm(len(r), generator=generator)[:per_class]] for r in rows])
    features = trained_features(inputs, targets, make, seed).cpu()
    choose = CHOSEN[method]
    return torch.cat([r[torch.tensor(choose(features[r], per_class))] for r in rows])


def trained_features(
    inputs: Callable[[Tensor], Tensor], targets: Tensor, make: Callable[[int], nn.Module], seed: int
) -> Tensor:
    """What the last linear layer of a network reads of every picture, after a training on all of them."""
    generator = drawn_from(seed, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = make(0).to(targets.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
        model.train()
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(targets), generator=generator).split(BATCH):
                rows = rows.to(targets.device)
                optimizer.zero_grad()
                F.cross_entropy(model(inputs(rows)), targets[rows]).backward()
                optimizer.step()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    every = torch.arange(len(targets), device=targets.device)

    def read(rows: Tensor) -> Tensor:
        x = inputs(rows)
        if not last:
            return model(x).flatten(1)
        with capture(model, f"{last[-1]}:in", stop_early=True) as acts:
            model(x)
        return acts[f"{last[-1]}:in"].flatten(1)

    with torch.no_grad(), frozen(model):
        return chunked(read, every, batch_size=512)
