"""The randomness of ReAGent's probes, in the order in which steps ask for it: drawn, or written down beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.prompts import Prompt
from lineament.explain.tokens.samplers import Sampler


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


@dataclass
class Scripted:
    """The draws of a :class:`Script`."""

    script: Script
    ratio: float

    def initial(self, probes: int, scored: int) -> Tensor:
        checks.tensor("script.initial", self.script.initial, shape=(probes, scored))
        return self.script.initial.double()

    def step(self, step: int) -> tuple[Tensor, Tensor, Any]:
        checks.require(
            step < len(self.script.uniforms), f"script: it ends after {len(self.script.uniforms)} steps"
        )
        mask = self.script.uniforms[step] < self.ratio
        return mask, self.script.replacements[step], self.script.fills[step]


@dataclass
class Random:
    """Draws of a generator, the same whatever number of steps goes through one forward."""

    prompt: Prompt
    sampler: Sampler
    probes: int
    ratio: float
    generator: torch.Generator

    def initial(self, probes: int, scored: int) -> Tensor:
        return torch.rand(probes, scored, generator=self.generator, dtype=torch.float64)

    def step(self, step: int) -> tuple[Tensor, Tensor, Any]:
        ids = self.prompt.ids.expand(self.probes, -1)
        mask = torch.rand(self.probes, len(self.prompt.places), generator=self.generator) < self.ratio
        if not self.sampler.joint:
            return mask, self.sampler(ids, None, self.generator), self.sampler(ids, None, self.generator)
        wide = torch.zeros(ids.shape, dtype=torch.bool)
        wide[:, self.prompt.places] = mask
        proposals = self.sampler(ids, wide, self.generator)
        # What the stop test replaces is known later, but its draws belong to this step.
        own = int(torch.randint(2**31, (), generator=self.generator))
        return mask, proposals, lambda m: self.sampler(ids, m, torch.Generator().manual_seed(own))
