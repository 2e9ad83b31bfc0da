"""Token sequences of which several independent features are to be written out one after the other: does the order of output decide how strongly each is held?

The sequence tasks of Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847): features that are written earlier are represented more strongly. Each feature reads tokens of a
block of its own, near each other or far apart; a sequence ends with a start token and the features' values, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lineament.core import checks
from lineament.core.checks import require
from lineament.data.bit_features import bit_feature
from lineament.data.samples import Samples

EXTENTS = ("near", "far")


def feature_sequences(
    samples: int,
    features: Sequence[str] = ("linear", "xor", "parity4"),
    *,
    order: Sequence[int] | None = None,
    vocabulary: int = 16,
    block: int = 8,
    extent: str = "near",
    seed: int = 0,
) -> Samples:
    """Token ids (sample, block tokens of each feature + start + features); targets (sample, feature) are the values, in the order in which they are written.

    A token counts as 1 where it is in the upper half of the vocabulary. The start token is ``vocabulary``, the values 0 and 1 are the two tokens after it (a value k is
    ``vocabulary + 1 + k``). For an encoder and decoder, cut the inputs at ``extras["start"]``, the position of the start token; the value of output k is to be
    predicted at that position + k.

    Args:
        features: names as :func:`~lineament.data.bit_features.bit_feature` takes them.
        order: which feature is written first, second, ...; as they are named by default.
        vocabulary: how many tokens there are to read, an even number.
        block: tokens of each feature's block.
        extent: ``"near"``: a feature reads the first tokens of its block; ``"far"``: tokens spread evenly over it.
        seed: of all tokens.

    >>> x = feature_sequences(100, ("linear", "xor"), order=(1, 0))
    >>> tuple(x.inputs.shape), x.classes, bool((x.inputs[:, -1] - 17 == (x.inputs[:, 0] >= 8)).all())
    ((100, 19), ('xor', 'linear'), True)
    """
    checks.number("samples", samples, low=1, integer=True)
    checks.number("vocabulary", vocabulary, low=2, integer=True)
    require(
        vocabulary % 2 == 0,
        f"vocabulary: got {vocabulary}, expected an even number, half of which counts as 1",
    )
    checks.one_of("extent", extent, EXTENTS)
    names = checks.listed("features", features, "features of bits, such as 'parity4'")
    made = [bit_feature(name) for name in names]
    for name, (bits, _) in zip(names, made):
        require(bits <= block, f"block: got {block}, expected at least {bits} tokens, which {name!r} reads")
    written = list(range(len(names))) if order is None else [int(k) for k in order]
    require(
        sorted(written) == list(range(len(names))),
        f"order: got {checks.show(order)}, expected each of 0 to {len(names) - 1} once",
    )
    draw = torch.Generator().manual_seed(checks.seed("seed", seed))
    tokens = torch.randint(vocabulary, (samples, len(names), block), generator=draw)
    values = []
    for number, (bits, f) in enumerate(made):
        places = torch.arange(bits) if extent == "near" else torch.linspace(0, block - 1, bits).round().long()
        values.append(f((tokens[:, number, places] >= vocabulary // 2).long()))
    answers = torch.stack([values[k] for k in written], 1)
    start = torch.full((samples, 1), vocabulary)
    inputs = torch.cat([tokens.flatten(1), start, vocabulary + 1 + answers], 1)
    at = torch.full((samples,), len(names) * block)
    return Samples(
        inputs,
        answers.float(),
        tuple(names[k] for k in written),
        extras={"start": at},
        source="sequences of features",
    )
