"""Random bits of which several independent features are to be computed, from simple to complex: the test bed of representation bias.

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847). Each feature is a function of bits of its own, so that features are independent of each
other and play the same role, while their complexity, learning order and prevalence differ; further bits carry nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.data.samples import Samples

# Of names without a number: how many bits, and the value from bits (..., bit) of 0 and 1.
_FIXED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "linear": (1, lambda b: b[..., 0]),
    "and": (2, lambda b: b.prod(-1)),
    "or": (2, lambda b: b.amax(-1)),
    "xor": (2, lambda b: b.sum(-1) % 2),
    "xor_of_xors": (4, lambda b: b.sum(-1) % 2),
    "and_of_xors": (4, lambda b: (b[..., :2].sum(-1) % 2) * (b[..., 2:].sum(-1) % 2)),
}
# Of names with numbers: a pattern, and the bits and the value from what it matched.
_COUNTED: dict[str, Callable[..., tuple[int, Callable[[Tensor], Tensor]]]] = {
    r"and(\d+)": lambda n: (n, lambda b: b.prod(-1)),
    r"or(\d+)": lambda n: (n, lambda b: b.amax(-1)),
    r"(?:parity|xor)(\d+)": lambda n: (n, lambda b: b.sum(-1) % 2),
    r"majority(\d+)": lambda n: (n, lambda b: (2 * b.sum(-1) > n).long()),
    r"sum_mod(\d+)_of_(\d+)": lambda m, n: (n, lambda b: b.sum(-1) % m),
}
NAMES = (*_FIXED, "and3", "or3", "parity3", "parity4", "majority5", "sum_mod3_of_6")


def bit_feature(name: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many bits a feature reads, and its value from bits (..., bit) of 0 and 1.

    Args:
        name: ``linear`` (one bit), ``and``, ``or``, ``xor``, ``xor_of_xors``, ``and_of_xors``, or one with numbers: ``parity4``, ``majority5``,
            ``and3``, ``or3``, ``sum_mod3_of_6`` (the sum of six bits modulo three).

    >>> bits, f = bit_feature("parity3")
    >>> bits, f(torch.tensor([[1, 1, 1], [1, 1, 0]])).tolist()
    (3, [1, 0])
    """
    if name in _FIXED:
        return _FIXED[name]
    for pattern, make in _COUNTED.items():
        if m := re.fullmatch(pattern, name):
            numbers = [int(v) for v in m.groups()]
            require(all(v > 0 for v in numbers), f"features: {name!r} has no bits, expected at least one")
            return make(*numbers)
    raise InputError(f"features: got {name!r}, which is no feature of bits{checks.suggest(name, NAMES)}")


def truth_table(name: str) -> Int[Tensor, " rows"]:
    """A feature's value for all tuples of its bits, in lexicographic order, the first bit slowest.

    >>> truth_table("and").tolist()
    [0, 0, 0, 1]
    """
    bits, f = bit_feature(name)
    return f(torch.tensor(list(itertools.product((0, 1), repeat=bits)))).long()


def bit_features(
    samples: int,
    features: Sequence[str] = ("linear", "parity4"),
    *,
    block: int = 8,
    noise: int = 8,
    agreement: Sequence[float] = (),
    prevalence: Sequence[float] = (),
    seed: int = 0,
) -> Samples:
    """Bits coded as -1 and 1, a block for each feature and ``noise`` idle ones; targets (sample, feature) are the features' values.

    Args:
        features: names as :func:`bit_feature` takes them, each of a block of its own.
        block: bits of each block; a feature reads the first ones.
        noise: bits that nothing reads.
        agreement: of each feature but the first, a share of samples (beyond chance) in which it is made equal to the first, by drawing its block
            anew; 0, the default, leaves them independent, 1 makes them equal.
        prevalence: of each feature, the share of samples in which its target is given; ``extras["given"]`` (sample, feature) says where.
        seed: of all bits.

    >>> x = bit_features(1000, ("linear", "xor"))
    >>> tuple(x.inputs.shape), bool((x.targets[:, 0] == (x.inputs[:, 0] > 0)).all())
    ((1000, 24), True)
    """
    checks.number("samples", samples, low=1, integer=True)
    checks.number("noise", noise, low=0, integer=True)
    names = checks.listed("features", features, "features of bits, such as 'parity4'")
    made = [bit_feature(name) for name in names]
    for name, (bits, _) in zip(names, made):
        require(bits <= block, f"block: got {block}, expected at least {bits} bits, which {name!r} reads")
    draw = torch.Generator().manual_seed(checks.seed("seed", seed))
    bits = torch.randint(2, (samples, len(names), block), generator=draw)
    idle = torch.randint(2, (samples, noise), generator=draw)
    first = made[0][1](bits[:, 0, : made[0][0]])
    for number, share in enumerate(agreement, start=1):
        checks.number("agreement", share, low=0, high=1)
        require(
            number < len(names),
            f"agreement: got {len(agreement)} shares for {len(names) - 1} further features",
        )
        count, f = made[number]
        same = torch.rand(samples, generator=draw) < share
        for _ in range(200):
            apart = same & (f(bits[:, number, :count]) != first)
            if not bool(apart.any()):
                break
            fresh = torch.randint(2, (int(apart.sum()), block), generator=draw)
            bits[apart, number] = fresh
        else:
            raise InputError(f"agreement: {names[number]!r} never takes some value of {names[0]!r}")
    values = torch.stack([f(bits[:, k, :count]) for k, (count, f) in enumerate(made)], 1).long()
    given = torch.ones(samples, len(names), dtype=torch.bool)
    for number, share in enumerate(prevalence):
        checks.number("prevalence", share, low=0, high=1)
        require(number < len(names), f"prevalence: got {len(prevalence)} shares for {len(names)} features")
        given[:, number] = torch.rand(samples, generator=draw) < share
    inputs = torch.cat([bits.flatten(1), idle], 1).float() * 2 - 1
    return Samples(
        inputs, values.float(), tuple(names), extras={"given": given}, source="features of random bits"
    )
