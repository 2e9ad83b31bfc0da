"""Other ways to make a network smaller, to given sizes of its layers: removal by norm or at random, random merging, correlation, k-means folding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor

from lineament.core.models import called, frozen
from lineament.core.sites.activations import capture
from lineament.core.surgery.rewriting import remove, rewrite
from lineament.measure.merging.distance import Weights
from lineament.measure.merging.merged import Merged

REMOVALS = ("L1 removal", "L2 removal", "random removal")
MERGERS = ("random merging", "correlation merging", "k-means folding")


def rows_of(merged: Merged, layer: str) -> Tensor:
    """What makes each channel of a layer, biases included."""
    model = merged.original
    tensors = {n: t.detach().double().cpu() for n, t in (*model.named_parameters(), *model.named_buffers())}
    weights, group = Weights(tensors), merged.channels[layer]
    return torch.cat([weights.rows(e, list(range(group.size))) for e in group.having("write", "scale")], 1)


def removed(merged: Merged, how: str, seed: int) -> torch.nn.Module:
    """The network with as many channels of each layer, those of the largest norm or any."""
    generator = torch.Generator().manual_seed(seed)
    gone = {}
    for layer, (before, after) in merged.sizes.items():
        rows = rows_of(merged, layer)
        score = {"L1 removal": rows.abs().sum(1), "L2 removal": rows.square().sum(1)}.get(how)
        score = torch.rand(before, generator=generator) if score is None else score
        gone[merged.channels[layer]] = score.argsort()[: before - after].tolist()
    return remove(merged.original, gone)


def grouped(merged: Merged, how: str, inputs: Tensor, seed: int) -> Merged:
    """The network with as many channels of each layer, each the mean of a cluster and read by the sum of its readers."""
    generator = torch.Generator().manual_seed(seed)
    groups, changes = {}, {}
    for layer, (before, after) in merged.sizes.items():
        member = (
            _clusters(merged, layer, how, inputs, generator, seed) if after < before else torch.arange(before)
        )
        whole = torch.zeros(after, before, dtype=torch.float64)
        whole[member, torch.arange(before)] = 1
        groups[layer] = member
        changes[merged.channels[layer]] = whole / whole.sum(1, keepdim=True), whole.T
    return replace(merged, model=rewrite(merged.original, changes), groups=groups)


def _clusters(
    merged: Merged, layer: str, how: str, inputs: Tensor, generator: torch.Generator, seed: int
) -> Tensor:
    before, after = merged.sizes[layer]
    if how == "random merging":
        member = torch.cat(
            [torch.arange(after), torch.randint(after, (before - after,), generator=generator)]
        )
        return member[torch.randperm(before, generator=generator)]
    if how == "k-means folding":
        means = KMeans(after, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
        found = means.fit(rows_of(merged, layer).numpy())
        return torch.from_numpy(found.labels_).long()
    with (
        frozen(merged.original),
        torch.no_grad(),
        capture(merged.original, [merged.layers[layer][0]]) as acts,
    ):
        called(merged.original, inputs)
    z = acts[merged.layers[layer][0]].double().relu()
    z = z.movedim(1, -1).reshape(-1, before)
    z = z - z.mean(0)
    z = z / z.norm(dim=0).clamp_min(1e-12)
    apart = (1 - z.T @ z).clamp_min(0).fill_diagonal_(0)
    found = AgglomerativeClustering(after, metric="precomputed", linkage="average").fit(apart.numpy())
    return torch.from_numpy(found.labels_).long()


def sizes_of(merged: Merged) -> Mapping[str, int]:
    return {layer: after for layer, (_, after) in merged.sizes.items()}
