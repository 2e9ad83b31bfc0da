"""Train a TopK dictionary on what the model answers, rather than on what passes at its site.

Braun, Taylor, Goldowsky-Dill, Sharkey, "Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning" (2024, arXiv 2405.12241):
the reconstruction goes on in place of x, and the loss is

    mean over tokens of KL(clean answer || answer on the reconstruction) + r |x - x'|^2 / variance

Directions that the layers above ignore then cost nothing to leave out. With r = 0 nothing holds x' near x where answers do not see it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checks import number, require
from lineament.core.codes import Codes
from lineament.core.models import device_of, frozen
from lineament.core.sites.activations import capture
from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.harvest import Harvest, seeded
from lineament.dictionaries.sequences import Batch
from lineament.dictionaries.splice import features_last, splice
from lineament.dictionaries.training import Trained, Trainer, TrainingOptions, described
from lineament.train.processes import OneProcess


def train_end_to_end(
    model: nn.Module,
    data: Any,
    *,
    site: str,
    dictionary: TopK,
    tokens: int,
    batch_size: int = 4096,
    learning_rate: float | str = "auto",
    reconstruction: float = 0.0,
    seed: int = 0,
    options: TrainingOptions | None = None,
) -> Trained:
    """Train a TopK dictionary by the KL divergence of the model's answers on its reconstruction from its own.

    Arguments and result as for :func:`lineament.dictionaries.train_dictionary`, but

    Args:
        data: token ids, (inputs, targets) and so on, taken by index; whole sequences pass the model in each step.
        batch_size: rows (tokens) a step, rounded to whole sequences.
        reconstruction: r, the weight of the squared error beside the divergence.
        options: ``alpha`` and ``k_aux`` have no use here: nothing revives dead latents. ``fvu`` in the history is the divergence plus the weighted error.

    Raises:
        InputError: another kind than TopK, data without an index, a site that answers do not depend on.

    >>> net = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    >>> found = train_end_to_end(net, torch.randn(64, 4), site="0", dictionary=TopK(4, 8, k=2), tokens=640, batch_size=64)
    >>> found.tokens, found.dictionary.info["training"]["loss"]
    (640, 'end to end')
    """
    options = options or TrainingOptions()
    require(
        isinstance(dictionary, TopK),
        f"dictionary: got {type(dictionary).__name__}, whose sparsity needs a penalty; expected TopK or BatchTopK",
    )
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        number(name, value, low=1, integer=True)
    number("reconstruction", reconstruction, low=0)
    checks.seed("seed", seed)
    stream = Harvest(model, data, site=site, exclude=options.exclude, buffer=options.buffer, seed=seed)
    sequences = stream.sequences
    require(sequences.indexed, "data: can only be walked in order; expected tensors or a Dataset, which are taken by index")  # fmt: skip
    first = next(stream.batches(max(1024, min(batch_size, 8192))))
    require(
        dictionary.d == first.x.shape[1],
        f"dictionary: made for {dictionary.d} dimensions, and {site!r} has {first.x.shape[1]}; make it with d={first.x.shape[1]}",
    )
    alone = OneProcess(device_of(model))
    place = stream.sites[0]
    about = described(
        model, place.name, alone, tokens=tokens, batch_size=batch_size, learning_rate=learning_rate, seed=seed, gradient=None,
        loss="end to end", reconstruction=reconstruction,
    )  # fmt: skip
    trainer = Trainer(dictionary, first, options, about, 0, alone)
    a_sequence = max(1, len(first.x) // max(1, len(first.sequences.unique())))
    size = max(1, batch_size // a_sequence)
    steps = math.ceil(tokens / (size * a_sequence))
    a_pass = math.ceil(len(sequences) / size)
    seen = 0
    for step in progress(range(steps), "training end to end"):
        epoch, part = divmod(step, a_pass)
        order = torch.randperm(len(sequences), generator=seeded(seed, epoch, 1))
        batch = sequences.take(order[part * size : (part + 1) * size])
        seen += _step(model, place, trainer, batch, reconstruction, step, steps)
    return trainer.finished(seen, 0)


class _InUnits:
    """The dictionary in training, of scaled activations, for activations as they pass."""

    def __init__(self, trainer: Trainer):
        self.sae, self.scale = trainer.dictionary, trainer.scale
        self.site, self.d = self.sae.site, self.sae.d

    def codes(self, x: Tensor) -> Codes:
        rows = self.sae.rows((x.reshape(-1, x.shape[-1]) * self.scale).to(self.sae.W_enc))
        found = TopK.chosen(self.sae, rows)
        shape = (*x.shape[:-1], -1)
        return Codes(found.indices.reshape(shape), found.values.reshape(shape), found.width)

    def decode(self, codes: Codes) -> Tensor:
        return self.sae.decode(codes) / self.scale


def _step(
    model: nn.Module, place: Any, trainer: Trainer, batch: Batch, weight: float, step: int, steps: int
) -> int:
    """One step; how many rows it saw."""
    inner = _InUnits(trainer)
    held: list[Codes] = []

    def see(codes: Codes) -> Codes:
        held.append(codes)
        return codes

    with frozen(model):
        with torch.no_grad(), capture(model, place.name) as acts:
            clean = batch.logits(batch.call(model)).float()
        x = features_last(acts[place.name], place)
        where = batch.mask if batch.mask is not None and batch.mask.shape == x.shape[:-1] else None
        with torch.enable_grad(), splice(model, inner, change=see, where=where):
            answer = batch.logits(batch.call(model)).float()
            p, q = (each.log_softmax(-1) for each in (clean, answer))
            kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            kept = kl[batch.mask] if batch.mask is not None and batch.mask.shape == kl.shape else kl
            loss = kept.mean()
        require(
            loss.requires_grad,
            f"site: the model's answer does not depend on {place.name!r}; choose another",
        )
        with torch.enable_grad():
            if weight:
                error = (x - inner.decode(held[0])).square().sum(-1) * trainer.scale**2 / trainer.dictionary.d
                loss = loss + weight * (error if where is None else error[where]).mean()
            named = {
                name: p
                for name, p in trainer.dictionary.named_parameters()
                if name in trainer.adam.parameters
            }
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    codes = held[0]
    indices, values = (
        v.detach() if where is None else v.detach()[where] for v in (codes.indices, codes.values)
    )
    trainer.count(indices[values > 1e-3], values.shape[:-1].numel())
    rows = values.shape[:-1].numel()
    l0 = (values > 0).sum(-1).double().mean()
    trainer.update(
        dict(zip(named, found)), (loss.detach(), torch.zeros_like(loss.detach())), l0, rows, step, steps
    )
    return rows
