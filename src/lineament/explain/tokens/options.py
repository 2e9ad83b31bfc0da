"""What a ReAGent run rarely needs, in one record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks


@dataclass(frozen=True)
class Script:
    """Draws written down beforehand, so that a run can be repeated exactly: one entry a step.

    A position is replaced in step n where ``uniforms[n] < ratio``; ``replacements`` and ``fills`` are what the sampler proposes to the
    perturbation and to the stop test of that step.
    """

    initial: Float[Tensor, "probes scored"]
    uniforms: Float[Tensor, "steps probes scored"]
    replacements: Int[Tensor, "steps probes tokens"]
    fills: Int[Tensor, "steps probes tokens"]


@dataclass(frozen=True)
class ReagentOptions:
    """What a ReAGent run rarely needs: its shares, its stopping rule, its rationale, and how it is computed.

    Attributes:
        ratio: r, the share of positions replaced by a step, in (0, 1).
        keep: n, what the stop test keeps: a number of tokens, or a share of them (rounded up).
        top_k: k, the target must be among the k most probable.
        max_steps, min_steps: N, and how many steps are made before the first stop test (0: the paper).
        stop: ``"top_k"``; ``"none"``: no test, every probe ends after ``min_steps`` steps (what ``steps`` chooses); or a function of logits
            (rows, vocabulary) and targets (rows,) that says which rows pass.
        invert_keep: let the stop test replace the best tokens instead of the others.
        majority: a prompt ends when this share of its probes has stopped.
        max_forwards: at most this many rows are asked of the model for each prompt.
        update: ``"logit"``, or ``"imp"``: s + g from s = 0.
        overlap, vote: the rationale are positions in the top n of at least this many probes; ``vote="token"`` counts equal tokens as one.
        lookahead: steps that go through one forward; ``None`` lets it grow with the steps made. It never changes the result.
        use_cache: whether what all rows have in common at the start comes from the key-value cache; ``None`` decides by its length.
        script: scripted draws instead of random ones, for one prompt.
        trace: keep the distribution of every probe after each step.

    Raises:
        InputError: an option outside its range.

    >>> ReagentOptions(ratio=0.1).keep
    0.3
    """

    ratio: float = 0.3
    keep: int | float = 0.3
    top_k: int = 3
    max_steps: int = 3000
    min_steps: int = 0
    stop: str | Callable[[Tensor, Tensor], Tensor] = "top_k"
    invert_keep: bool = False
    majority: float = 1.0
    max_forwards: int | None = None
    update: str = "logit"
    overlap: int = 2
    vote: str = "position"
    lookahead: int | None = None
    use_cache: bool | None = None
    script: Script | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        checks.number("ratio", self.ratio, low=0, high=1, open_low=True, open_high=True)
        checks.number("majority", self.majority, low=0, high=1, open_low=True)
        for name, low in (
            ("top_k", 1), ("max_steps", 1), ("min_steps", 0), ("overlap", 1), ("max_forwards", 1), ("lookahead", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), low=low, integer=True)
        checks.require(
            self.min_steps <= self.max_steps,
            f"min_steps: got {self.min_steps}, expected at most max_steps ({self.max_steps})",
        )
        if not callable(self.stop):
            checks.one_of("stop", self.stop, ("top_k", "none"))
        checks.one_of("update", self.update, ("logit", "imp"))
        checks.one_of("vote", self.vote, ("position", "token"))
        kept(self.keep, 1)


def kept(keep: int | float, scored: int) -> int:
    """How many positions the stop test keeps: ``keep`` itself, or that share of the scored ones, rounded up.

    Raises:
        InputError: no number of tokens, nor a share in (0, 1).

    >>> kept(0.3, 10), kept(5, 10)
    (3, 5)
    """
    if isinstance(keep, int):
        return checks.number("keep", keep, low=1, integer=True)
    checks.number("keep", keep, low=0, high=1, open_low=True, open_high=True)
    return math.ceil(keep * scored - 1e-9)
