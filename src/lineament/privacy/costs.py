"""How well does a guessed picture's gradient fit a message? Matching costs, weights of layers, and what keeps pictures natural.

Fang et al., "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization", ICCV 2023, arXiv 2308.04699, section 1.2; most costs are of Geiping et
al. 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.gradients import distance

COSTS = ("sim", "l2", "l1", "max", "sim_cmpr", "compressed", "layerwise")
WEIGHTS = ("equal", "linear", "exp")


def matching_cost(
    guess: Sequence[Tensor],
    message: Sequence[Tensor],
    cost: Literal["sim", "l2", "l1", "max", "sim_cmpr", "compressed", "layerwise"] = "sim",
    *,
    ratio: float = 0.0,
    weights: Literal["equal", "linear", "exp"] = "equal",
    tensors: Sequence[int] | None = None,
) -> Tensor:
    """The distance of two gradients, one tensor a parameter: names over :func:`lineament.core.gradients.distance`.

    Args:
        cost: ``"sim"``: 1 - one cosine over all tensors (1 where one side is zero); ``"l2"``: mean over tensors of squared distances; ``"l1"``, ``"max"``: sums of absolute
            differences and of the largest; ``"sim_cmpr"``: sim over the message's largest entries of each tensor; ``"compressed"``: squared
            distances of each side's own largest entries; ``"layerwise"``: Σ (1 - cosine) over tensors.
        ratio: the share of entries that the two compressed costs leave out.
        weights: of the tensors by their place: equal, falling linearly, or exponentially. tensors: numbers of those that count.

    >>> matching_cost([torch.ones(2)], [torch.ones(2)], "l2").item()
    0.0
    """
    one_of("cost", cost, COSTS)
    require(
        len(guess) == len(message)
        and all(a.shape == b.shape for a, b in zip(guess, message))
        and len(guess) > 0,
        "message: expected as many gradients as the guess has, of the same shapes",
    )
    number("ratio", ratio, low=0, high=1, open_high=True)
    w = layer_weights(len(guess), weights, guess[0])
    if cost == "sim_cmpr":
        kept = [largest(m, ratio) for m in message]
        guess, message = [g * (m != 0) for g, m in zip(guess, kept)], kept
    elif cost == "compressed":
        guess, message = ([largest(g, ratio) for g in each] for each in (guess, message))
    if cost == "layerwise":  # published without weights
        return distance(guess, message, "layer", eps=1e-30, tensors=tensors)
    kind = {"l1": "l1", "max": "max", "sim": "cosine", "sim_cmpr": "cosine"}.get(cost, "l2")
    # A message of zeros has no direction: it is at 1 from every guess.
    found = distance(guess, message, kind, eps=1e-30, weights=w, tensors=tensors)
    return found / len(guess if tensors is None else tensors) if cost == "l2" else found


def layer_weights(count: int, kind: str, like: Tensor) -> Tensor:
    """Weights of tensors: 1; (P - i) / P; or softmax(P, ..., 1) over its first entry.

    >>> layer_weights(2, "linear", torch.zeros(1)).tolist()
    [1.0, 0.5]
    """
    one_of("weights", kind, WEIGHTS)
    falling = torch.arange(count, 0, -1, dtype=like.dtype, device=like.device)
    if kind == "linear":
        return falling / count
    found = falling.softmax(0)
    return found / found[0] if kind == "exp" else torch.ones_like(falling)


def index_set(text: str) -> tuple[str, int | None]:
    """Which tensors, and how many, by a description.

    >>> index_set("topk 4"), index_set("all")
    (('topk', 4), ('all', None))
    """
    which, _, count = text.partition(" ")
    one_of("tensors", which, ("all", "first", "last", "topk", "random"))
    require(
        (which == "all") == (not count) and (not count or (count.isdigit() and int(count) > 0)),
        f"tensors: got {text!r}, expected 'all', or 'first', 'last', 'topk' or 'random' with a number, such as 'topk 4'",
    )
    return which, int(count) if count else None


def chosen_tensors(
    message: Sequence[Tensor], which: str, k: int | None = None, *, seed: int = 0
) -> list[int]:
    """Numbers of the tensors that a cost looks at: ``"all"``, the ``"first"`` k, the ``"last"`` k, the k of largest norm (``"topk"``), or k drawn at ``"random"``.

    >>> chosen_tensors([torch.ones(1), torch.ones(9)], "topk", 1)
    [1]
    """
    count = len(message)
    if which == "all":
        return list(range(count))
    if k is None:
        raise InputError(f"k: expected how many tensors {which!r} takes")
    size: int = min(number("k", k, low=1, integer=True), count)
    if which == "topk":
        norms = torch.stack([g.norm() for g in message])
        return norms.topk(size).indices.tolist()
    one_of("which", which, ("all", "first", "last", "topk", "random"))
    if which == "random":
        return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size].tolist())
    return list(range(size)) if which == "first" else list(range(count - size, count))


def largest(values: Tensor, ratio: float) -> Tensor:
    """The max(1, ⌊n (1 - ratio)⌋) entries of largest magnitude, the others 0.

    >>> largest(torch.tensor([1.0, -3.0]), 0.5).tolist()
    [0.0, -3.0]
    """
    count = max(1, int(values.numel() * (1 - ratio)))
    keep = torch.zeros_like(values, dtype=torch.bool).flatten()
    keep = keep.scatter(0, values.detach().flatten().abs().topk(count).indices, True)
    return values * keep.view_as(values)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, along columns plus along rows; of pictures one row high, NaN.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])).item()
    1.0
    """
    require(x.ndim == 4, f"x: got {show(x)}, expected [n, channels, height, width]")
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def code_divergence(z: Tensor, *, eps: float = 1e-10) -> Tensor:
    """Σ over codes of the divergence of N(mean, std²) of a code's entries from N(0, 1), [n, d] -> ().

    >>> round(code_divergence(torch.tensor([[-1.0, 1.0]])).item(), 6)
    0.0
    """
    variance, mean = torch.var_mean(z, 1, correction=0)
    return (-0.5 * (1 + (variance + eps).log() - mean.square() - variance)).sum()
