"""Sparse dictionaries on the small model's residual stream, and the circuits that their features' effects make."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.sites.activations import record
from lineament.data.patching_tasks import TokenPairs, synthetic_ioi
from lineament.explain.patching.circuit_curves import circuit_curve
from lineament.explain.patching.circuits import NodeEffects, node_effects
from lineament.explain.patching.metrics import logit_difference

COUNTS = (5, 10, 20, 40, 80, 160, 320, 640)
METHODS = ("attrib", "relp", "ig")


class TopK(nn.Module):
    """A sparse autoencoder that keeps each activation's k greatest latents."""

    def __init__(self, width: int, latents: int, k: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(latents, width), dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().T.clone())
        self.bias, self.centre, self.k = (
            nn.Parameter(torch.zeros(latents)),
            nn.Parameter(torch.zeros(width)),
            k,
        )

    def encode(self, x: Tensor) -> Tensor:
        pre = ((x - self.centre) @ self.encoder + self.bias).relu()
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.decoder + self.centre


def dictionary(activations: Tensor, *, latents: int, k: int, steps: int, seed: int) -> tuple[TopK, float]:
    """A dictionary trained on activations (samples, width), and the share of their variance that it does not explain."""
    x = activations.float()
    model = TopK(x.shape[1], latents, k, seed)
    model.centre.data = x.mean(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (1024,), generator=generator)]
        loss = (model.decode(model.encode(batch)) - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.decoder.data = nn.functional.normalize(model.decoder, dim=1)
    with torch.no_grad():
        error = (model.decode(model.encode(x)) - x).square().sum()
        unexplained = float(error / (x - x.mean(0)).square().sum())
    return model.double().eval().requires_grad_(False), unexplained


def circuits(model: Any, *, latents: int, steps: int, pairs: int, seed: int) -> dict[str, Any]:
    """Faithfulness and completeness by method and number of nodes, judged on other prompts than the effects come from."""
    layers = range(1, model.config.n_layer)
    sites = [f"transformer.h.{k}:in" for k in layers]
    seen = record(model, {"input_ids": synthetic_ioi(3000, seed=400 + seed).clean}, sites)
    found = {
        s: dictionary(x.flatten(0, 1), latents=latents, k=16, steps=steps, seed=seed) for s, x in seen.items()
    }
    dictionaries = {s: made for s, (made, _) in found.items()}
    discover, judge = synthetic_ioi(pairs, seed=200 + seed), synthetic_ioi(pairs, seed=300 + seed)
    effects, seconds = {}, {}
    for method in METHODS:
        start = time.perf_counter()
        rules = ("ln", "identity")
        effects[method] = node_effects(
            model,
            discover.clean,
            discover.corrupt,
            _metric(discover),
            dictionaries=dictionaries,
            method=method,
            rules=rules,
        )
        seconds[method] = time.perf_counter() - start
    effects["random"] = _shuffled(effects["relp"], seed)
    curves = {}
    for method, of in effects.items():
        curve = circuit_curve(
            model,
            judge.clean,
            judge.corrupt,
            _metric(judge),
            of,
            dictionaries=dictionaries,
            thresholds=levels(of, COUNTS),
        )
        curves[method] = {
            "nodes": list(curve.nodes), "faithfulness": list(curve.faithfulness), "completeness": list(curve.completeness)
        }  # fmt: skip
    total = sum(v[0].numel() for v in effects["relp"].features.values()) + sum(
        v[0].numel() for v in effects["relp"].errors.values()
    )
    return {
        "curves": curves,
        "seconds": seconds,
        "unexplained": [u for _, u in found.values()],
        "nodes": total,
    }


def levels(effects: NodeEffects, counts: Sequence[int]) -> list[float]:
    """Thresholds above which lie these numbers of nodes."""
    sizes = torch.cat(
        [
            value.mean(0).abs().flatten()
            for part in (effects.features, effects.errors)
            for value in part.values()
        ]
    )
    ordered = sizes.sort(descending=True).values
    return [float(ordered[min(count, len(ordered) - 1)]) for count in counts]


def _metric(pairs: TokenPairs) -> Any:
    return logit_difference(pairs.correct, pairs.wrong)


def _shuffled(effects: NodeEffects, seed: int) -> NodeEffects:
    generator = torch.Generator().manual_seed(seed)

    def noise(parts: Any) -> dict[str, Tensor]:
        return {
            s: torch.rand(v.shape[1:], generator=generator).double().expand_as(v) for s, v in parts.items()
        }

    return NodeEffects(noise(effects.features), noise(effects.errors), "random")
