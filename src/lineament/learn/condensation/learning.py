"""The loop that learns pictures: fresh networks, matching steps on each, and between them the network's own training on the pictures.

Lee et al., ICML 2022, arXiv 2202.02916, section 1.4. All that is drawn depends on the seed and the step's numbers alone, so that a killed run ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import NotFiniteError
from lineament.core.matching import summed_gradient
from lineament.core.norms import batchnorms, recalibrate
from lineament.learn.condensation.matching import matched, real_gradient
from lineament.learn.condensation.options import Condensation
from lineament.learn.condensation.siamese import Strategy

# Real pictures a class that set the statistics of batch norms.
_STATISTICS = 16
# Pixels of a network's training at a time: 25 pictures of 32 x 32.
_CACHED = 25 * 32 * 32
Batches = Callable[[int, int], Sequence[Tensor]]
Groups = Callable[[int], Sequence[Sequence[int]]]


def learn_pictures(
    networks: Callable[[int], nn.Module],
    pictures: Tensor,
    labels: Tensor,
    batches: Batches,
    options: Condensation,
    *,
    strategy: Strategy | None = None,
    groups: Groups | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures learned by matching gradients, and the trace of every step: outer and inner number, whether summed, the loss before it, the share of vanished rows.

    Args:
        networks: the network of an outer step. batches: the real pictures of each class, for an outer and inner step.
        pictures, labels: the start, such as real pictures; labels from 0 without gaps.
        options: resolved ones. groups: classes that are summed together, for an outer step; all by default.
        bounds: the least and greatest values of a picture.

    >>> x = torch.randn(2, 4)
    >>> how = Condensation(outer=2, inner=2, epochs=1).resolved(1, 2)
    >>> learn_pictures(lambda k: nn.Linear(4, 2), x, torch.arange(2), lambda i, j: [x[:1] + 1, x[1:] + 1], how)[1].shape
    torch.Size([4, 5])
    """
    classes = int(labels.max()) + 1
    members = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    pictures = pictures.detach().clone()
    velocity = torch.zeros_like(pictures)
    trace: list[list[float]] = []
    steps = range(options.outer)
    if checkpoint is not None:
        steps = checkpoint.loop(
            "pictures", options.outer, {"pictures": pictures, "velocity": velocity, "trace": trace}
        )
    inner_steps = options.inner or 0

    def learned() -> Iterator[int]:
        """Steps by their number, each once it is done."""
        for outer in steps:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(drawn_from(seed, outer).initial_seed())
                model = networks(outer).to(pictures.device)
                optimizer = torch.optim.SGD(
                    model.parameters(), lr=options.network_rate, momentum=options.network_momentum
                )
                together = [range(classes)] if groups is None else groups(outer)
                for inner in range(inner_steps):
                    real = batches(outer, inner)
                    _settle(model, real, options.parity)
                    summed = options.summed(outer, inner)
                    shown = together if summed else [[c] for c in range(classes)]
                    step = _Step(model, real, members, labels, options, strategy, (seed, outer, inner))
                    loss, gradient, small = step(pictures, shown)
                    trace.append([float(outer), float(inner), float(summed), loss, small])
                    rate = options.rate_of(classes, len(shown))
                    velocity.mul_(options.momentum).add_(options.capped(gradient, rate))
                    pictures.sub_(velocity, alpha=rate)
                    if bounds is not None:
                        pictures.copy_(torch.minimum(torch.maximum(pictures, bounds[0]), bounds[1]))
                    if not np.isfinite(loss) or not bool(torch.isfinite(pictures).all()):
                        raise NotFiniteError(
                            f"rate: the pictures diverged in network {outer}, step {inner} (loss {loss}); lower it, now {rate:g}"
                        )
                    if inner < inner_steps - 1:
                        generator = drawn_from(seed, outer, inner, 1)
                        _train(model, optimizer, pictures, labels, options, strategy, generator)
                    yield outer * inner_steps + inner

    total = options.outer * inner_steps
    for _ in progress(learned(), "matching steps", total, before=int):
        pass
    return pictures, torch.tensor(trace, dtype=torch.float64).reshape(-1, 5)


class _Step:
    """One matching step: the loss, its derivative by the pictures, and the share of rows whose gradients have vanished."""

    def __init__(
        self,
        model: nn.Module,
        real: Sequence[Tensor],
        members: Sequence[Tensor],
        labels: Tensor,
        options: Condensation,
        strategy: Strategy | None,
        place: tuple[int, ...],
    ):
        self.model, self.real, self.members, self.labels = model, real, members, labels
        self.options, self.strategy, self.place = options, strategy, place
        # Biases and norm scales have no rows: their gradients need not be computed.
        scored = [
            p for p in model.parameters() if p.requires_grad and (p.ndim > 1 or options.distance != "rows")
        ]
        self.weights = scored

    def __call__(self, pictures: Tensor, groups: Sequence[Sequence[int]]) -> tuple[float, Tensor, float]:
        total, small, parts = 0.0, 0.0, []
        for group in groups:
            rows = [self.members[c] for c in group]
            goal = real_gradient(
                self.model, self.weights, [self._changed(self.real[c], c, 1) for c in group], group, bfloat16=self.options.bfloat16
            )  # fmt: skip
            order = torch.cat(rows)
            if self.strategy is None and torch.equal(order, torch.arange(len(pictures), device=order.device)):
                shown = pictures  # all in order: the set is not copied
            else:
                shown = torch.cat([self._changed(pictures[r], c) for r, c in zip(rows, group)])
            value, slope, vanished = matched(
                self.model, self.weights, shown, self.labels[order], goal, kind=self.options.distance, chunk=self.options.chunk,
            )  # fmt: skip
            for r, c, part in zip(rows, group, slope.split([len(r) for r in rows])):
                if self.strategy is not None:
                    # Augmented anew, so that no copy of the set is held while networks are differentiated.
                    leaf = pictures[r].requires_grad_()
                    part = torch.autograd.grad(self._changed(leaf, c), leaf, part)[0]
                parts.append((r, part))
            total += float(value)
            small += float(vanished) / len(groups)
        gradient = torch.zeros_like(pictures)
        for r, part in parts:
            gradient[r] = part
        return total, gradient, small

    def _changed(self, x: Tensor, c: int, side: int = 0) -> Tensor:
        """Pictures of a class augmented, real ones (side 1) by the same draws as synthetic ones."""
        if self.strategy is None:
            return x
        each = not self.options.siamese
        generator = drawn_from(*self.place, 0, c, side if each else 0)
        return self.strategy(x, generator, each=each)


def drawn_from(*numbers: int) -> torch.Generator:
    """A generator that these numbers alone decide."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator().manual_seed(state)


def _settle(model: nn.Module, real: Sequence[Tensor], parity: bool) -> None:
    """Bring a network into the mode of a matching step, with batch norms' statistics of real pictures."""
    if batchnorms(model):
        some = torch.cat([batch[:_STATISTICS] for batch in real])
        if parity:
            with torch.no_grad():
                model.train()(some)
        else:
            recalibrate(model, [some])
    model.eval()


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: Tensor,
    labels: Tensor,
    options: Condensation,
    strategy: Strategy | None,
    generator: torch.Generator,
) -> None:
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    whole = len(labels) <= options.batch_train
    # On a processor activations of few pictures stay in its caches; batch norms need all at once.
    few = pictures.device.type == "cpu" and not batchnorms(model)
    size = max(1, _CACHED // pictures[0, :1].numel()) if few else options.batch_train
    for _ in range(options.epochs or 0):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in [slice(None)] if whole else order.split(options.batch_train):
            x = pictures[rows]
            if strategy is not None:
                x = strategy(x, generator, each=True)
            told = labels[rows].split(size)

            def loss(k: int, part: Tensor, told: Sequence[Tensor] = told, count: int = len(x)) -> Tensor:
                with torch.autocast(part.device.type, torch.bfloat16, enabled=options.bfloat16):
                    found = model(part)
                return F.cross_entropy(found.to(part.dtype), told[k], reduction="sum") / count

            for weight, gradient in zip(weights, summed_gradient(loss, weights, x.split(size))):
                weight.grad = gradient
            optimizer.step()
