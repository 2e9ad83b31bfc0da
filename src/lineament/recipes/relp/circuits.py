"""Sparse dictionaries on the small model's residual stream, and the circuits that their features' effects make."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.sites.activations import record
from lineament.data.patching_tasks import TokenPairs, synthetic_ioi
from lineament.explain.patching.circuit_curves import CircuitCurve, circuit_curve
from lineament.explain.patching.circuits import NodeEffects, node_effects
from lineament.explain.patching.metrics import logit_difference
from lineament.recipes.relp.claims import COUNTS
from lineament.train.loop import fit


@dataclass(frozen=True)
class Circuits:
    """The curves of one model's circuits by method; the seconds that each took; the variance that each site's dictionary leaves unexplained; all nodes."""

    curves: dict[str, CircuitCurve]
    seconds: dict[str, float]
    unexplained: list[float]
    nodes: int


class TopK(nn.Module):
    """A sparse autoencoder that keeps each activation's k largest latents."""

    def __init__(self, x: Tensor, latents: int, k: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(latents, x.shape[1], generator=generator)
        self.decoder = nn.Parameter(F.normalize(directions, dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().T.clone())
        self.bias, self.centre = nn.Parameter(torch.zeros(latents)), nn.Parameter(x.mean(0))
        self.k = k

    def encode(self, x: Tensor) -> Tensor:
        pre = ((x - self.centre) @ self.encoder + self.bias).relu()
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.decoder + self.centre

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def on_step(self, run: Any) -> None:
        """Directions stay of unit length."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))


def dictionary(activations: Tensor, *, latents: int, k: int, steps: int, seed: int) -> tuple[TopK, float]:
    """A dictionary trained on activations (samples, width), and the share of their variance that it does not explain."""
    x = activations.float()
    model = TopK(x, latents, k, seed)
    fit(
        model,
        (x, x),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
        epochs=max(1, round(1024 * steps / len(x))),
        batch_size=1024,
        loss=lambda y, x: (y - x).square().sum(-1).mean(),
        callbacks=[model],
        seed=seed,
        name="dictionary",
    )
    with torch.no_grad():
        unexplained = float((model(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    return model.double().eval().requires_grad_(False), unexplained


def circuits(model: Any, *, latents: int, steps: int, pairs: int, seed: int) -> Circuits:
    """Faithfulness and completeness by method and number of nodes, judged on other prompts than the effects come from."""
    sites = [f"transformer.h.{k}:in" for k in range(1, model.config.n_layer)]
    seen = record(model, {"input_ids": synthetic_ioi(3000, seed=400 + seed).clean}, sites)
    found = {
        s: dictionary(x.flatten(0, 1), latents=latents, k=16, steps=steps, seed=seed) for s, x in seen.items()
    }
    dictionaries = {s: made for s, (made, _) in found.items()}
    discover, judge = synthetic_ioi(pairs, seed=200 + seed), synthetic_ioi(pairs, seed=300 + seed)
    effects, seconds = {}, {}
    for method in ("attrib", "relp", "ig"):
        start = time.perf_counter()
        effects[method] = node_effects(
            model, *_prompts(discover), dictionaries=dictionaries, method=method, rules=("ln", "identity")
        )
        seconds[method] = time.perf_counter() - start
    effects["random"] = _random_like(effects["relp"], seed)
    curves = {
        method: circuit_curve(model, *_prompts(judge), of, dictionaries=dictionaries, thresholds=_levels(of))
        for method, of in effects.items()
    }
    return Circuits(curves, seconds, [u for _, u in found.values()], len(_sizes(effects["relp"])))


def _prompts(pairs: TokenPairs) -> tuple[Tensor, Tensor, Any]:
    return pairs.clean, pairs.corrupt, logit_difference(pairs.correct, pairs.wrong)


def _sizes(effects: NodeEffects) -> Tensor:
    parts = [*effects.features.values(), *effects.errors.values()]
    return torch.cat([value.mean(0).abs().flatten() for value in parts])


def _levels(effects: NodeEffects) -> list[float]:
    """Thresholds above which the circuits have the sizes that are compared."""
    ordered = _sizes(effects).sort(descending=True).values
    return [float(ordered[min(count, len(ordered) - 1)]) for count in COUNTS]


def _random_like(effects: NodeEffects, seed: int) -> NodeEffects:
    generator = torch.Generator().manual_seed(seed)

    def noise(parts: Any) -> dict[str, Tensor]:
        return {
            s: torch.rand(v.shape[1:], generator=generator).double().expand_as(v) for s, v in parts.items()
        }

    return NodeEffects(noise(effects.features), noise(effects.errors), "random")
