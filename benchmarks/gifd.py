"""One step of gradient inversion against the published procedure, and the projection against sorting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.bench import Row, compare, quick
from lineament.privacy.constraints import l1_projection
from lineament.privacy.costs import matching_cost
from lineament.privacy.messages import Message, dummy_gradient
from lineament.recipes.kit.networks import network

SLUG = "gifd"


def sorted_projection(x: Tensor, radius: float) -> Tensor:
    """The published projection: sort, then the last place where the running sum allows."""
    size = x.abs()
    ordered = size.sort(1, descending=True).values
    total = ordered.cumsum(1)
    place = torch.arange(1, x.shape[1] + 1)
    last = (place * ordered > total - radius).sum(1, keepdim=True) - 1
    tau = (total.gather(1, last) - radius) / (last + 1)
    return x.sign() * (size - tau).clamp(min=0)


def published_cost(found: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    """One minus one cosine over all tensors, as the official code adds it up."""
    shared = one = two = torch.zeros(())
    for a, b in zip(found, sent):
        shared = shared + (a * b).sum()
        one, two = one + a.pow(2).sum(), two + b.pow(2).sum()
    return 1 - shared / one.sqrt() / two.sqrt()


def rows(repeats: int = 3) -> Iterator[Row]:
    width = 16 if quick() else 64
    net = network("resnet18", (3, 32, 32), 10, seed=0, widths=(width,)).eval()
    for batch in (1,) if quick() else (1, 8):
        x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
        sent = Message.of(net, x, y).tensors
        guess = torch.randn_like(x)
        compute = dummy_gradient(net, y[None])

        def ours(guess: Tensor = guess, compute=compute, sent=sent) -> None:
            v = guess.clone().requires_grad_()
            torch.autograd.grad(matching_cost([g[0] for g in compute(v[None])], sent), v)

        def theirs(guess: Tensor = guess, y: Tensor = y, sent=sent) -> None:
            v = guess.clone().requires_grad_()
            net.zero_grad()
            found = torch.autograd.grad(F.cross_entropy(net(v), y), list(net.parameters()), create_graph=True)
            published_cost(found, sent).backward()

        yield compare(
            SLUG,
            f"matching step, ResNet-18 of width {width}, 32 x 32, batch {batch}",
            ours,
            "the published step: backward into all weights",
            theirs,
            target=1.2,
            repeats=repeats,
            note="7 forward passes at least (1 + 2 + 4); the published step takes about 12, and for one picture as much again for tensors of the weights' size",
        )
    n = 2**17 if quick() else 2**21
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    radius, tau = 0.04 * n, torch.zeros(1)
    l1_projection(x, radius, warm=tau)
    for how, target, warm in (("cold", 4.0, None), ("from the step before", 10.0, tau)):
        moved = x if warm is None else x + 1e-3 * torch.randn_like(x)
        yield compare(
            SLUG,
            f"l1 projection, {n:,} entries, {how}",
            lambda moved=moved, warm=warm: l1_projection(
                moved, radius, warm=None if warm is None else warm.clone()
            ),
            "sorting",
            lambda moved=moved: sorted_projection(moved, radius),
            target=target,
            repeats=repeats,
            note="three passes over the entries are the limit",
        )


if __name__ == "__main__":
    for row in rows():
        print(row)
