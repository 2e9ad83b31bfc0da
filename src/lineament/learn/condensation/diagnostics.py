"""How a network moves while it learns from a set, and whether the set points where the data point.

ArXiv 2202.02916, section 1.7: the velocity of the tangent kernel (Fort et al. 2020) is why matching is warmed up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lineament.core.checks import number
from lineament.core.models import frozen
from lineament.learn.condensation.coresets import kernel_distance


def jacobian(model: nn.Module, images: Tensor) -> Tensor:
    """Derivatives of every output of every picture by all weights, [pictures x outputs, weights].

    >>> jacobian(nn.Linear(2, 3), torch.ones(4, 2)).shape
    torch.Size([12, 9])
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rest = dict(model.named_buffers())

    def outputs(held: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, {**held, **rest}, (x[None],))[0]

    with frozen(model):
        found = vmap(jacrev(outputs), in_dims=(None, 0))(weights, images)
    return torch.cat([j.flatten(2) for j in found.values()], 2).flatten(0, 1)


def kernel_velocity(
    model: nn.Module, pictures: Tensor, labels: Tensor, probe: Tensor, *, epochs: int = 20, rate: float = 0.01
) -> Tensor:
    """How fast the kernel J Jᵀ on probe pictures turns in each epoch of a training on some pictures, [epochs]; the model is left as it was.

    1 - the cosine of the kernels before and after, over a time of one epoch. Few probe pictures do: J has outputs times as many rows, and as many columns as weights.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> kernel_velocity(net, torch.rand(2, 1, 2, 2), torch.arange(2), torch.rand(3, 1, 2, 2), epochs=2).abs().max().item() < 1e-5
    True
    """
    number("epochs", epochs, low=1, integer=True)
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    found = []
    try:
        before = jacobian(model, probe)
        for _ in range(epochs):
            model.train()
            gradients = torch.autograd.grad(
                nn.functional.cross_entropy(model(pictures), labels), list(model.parameters())
            )
            with torch.no_grad():
                for weight, gradient in zip(model.parameters(), gradients):
                    weight.sub_(gradient, alpha=rate)
            after = jacobian(model, probe)
            found.append(kernel_distance(before, after))
            before = after
    finally:
        model.load_state_dict(kept)
        for module, mode in modes:
            module.training = mode
    return torch.stack(found).detach()


def class_directions(real: Tensor, targets: Tensor, synthetic: Tensor, labels: Tensor) -> Tensor:
    """For each class the cosine of where its real and its synthetic features lie, seen from the mean of all classes, [classes].

    >>> x = torch.eye(3)
    >>> [round(v, 3) for v in class_directions(x, torch.arange(3), 2 * x, torch.arange(3)).tolist()]
    [1.0, 1.0, 1.0]
    """
    sides = []
    for features, y in ((real, targets), (synthetic, labels)):
        means = torch.stack([features[y == c].flatten(1).mean(0) for c in range(int(targets.max()) + 1)])
        sides.append(means - means.mean(0))
    return nn.functional.cosine_similarity(sides[0], sides[1], dim=1)
