"""What one training step with alignment does in each layer: compute both kinds of attention, pass one on, keep how far apart they are.

Shen et al. 2026, arXiv 2511.20102, sections 1.3 and 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import number, one_of, require
from lineament.modules.sparse_attention.alignment import alignment_loss, distance
from lineament.modules.sparse_attention.attend import attend, attend_both, full_attention
from lineament.modules.sparse_attention.options import Budget


@dataclass(frozen=True)
class AlignmentOptions:
    """The switches of the paper's ablations; the defaults are its method.

    Attributes:
        coin: ``"step"``: one for all layers; ``"layer"``: one each (which diverges in the paper).
        w_sparsity, w_commit: weights of the loss that moves full attention towards sparse, and of the one that moves sparse towards full; 0 leaves one out.
        form, beta: ``"smooth_l1"`` with its ``beta``, or ``"l2"``.
        place: of models with an output gate, compare outputs after it (as the released code does) or before it (as the paper's algorithm says).
        scoring: of the blocks.
    """

    coin: Literal["step", "layer"] = "step"
    w_sparsity: float = 1.0
    w_commit: float = 1.0
    form: Literal["smooth_l1", "l2"] = "smooth_l1"
    beta: float = 1.0
    place: Literal["post_gate", "pre_gate"] = "post_gate"
    scoring: Literal["group_softmax", "dot"] = "group_softmax"

    def __post_init__(self) -> None:
        one_of("coin", self.coin, ("step", "layer"))
        one_of("form", self.form, ("smooth_l1", "l2"))
        one_of("place", self.place, ("post_gate", "pre_gate"))
        number("w_sparsity", self.w_sparsity, low=0)
        number("w_commit", self.w_commit, low=0)


@dataclass
class Branch(Budget):
    """The step's coins and the alignment of each layer.

    Attributes:
        losses: by layer, of the last call of the model.
        coins: whether each layer passes full attention on.
    """

    alpha: float = 10.0
    options: AlignmentOptions = field(default_factory=AlignmentOptions)
    coins: dict[int, bool] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    # While a layer is computed again for its backward pass its loss has been taken already.
    again: bool = False

    @property
    def loss(self) -> Tensor:
        """alpha times the mean alignment of the layers; add it to the model's own loss."""
        require(
            self.alpha == 0 or bool(self.losses),
            "branch.loss: the model has not been called inside aligned(...), expected a forward pass first",
        )
        if not self.losses:
            return torch.zeros(())
        values = list(self.losses.values())
        return self.alpha * torch.stack([x.to(values[0].device) for x in values]).mean()

    def attended(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: dict[str, Any],
        scale: float | None,
        gate: Tensor | None,
    ) -> Tensor:
        """The output that goes on, after the gate, [batch, heads, tokens, size]; the layer's loss is kept."""
        layer = module.layer_idx
        budget, full = self.of(layer), self.coins[layer]
        blocks = budget.choosing()
        factor = 1 if gate is None else gate
        if self.alpha == 0:
            return factor * (
                full_attention(q, k, v, scale=scale, **past) if full
                else attend(q, k, v, scale=scale, **blocks, **past).output
            )  # fmt: skip
        require(
            torch.is_grad_enabled() or not module.training,
            "aligned: gradients are off inside the layers, as in reentrant checkpointing, which would drop the alignment; "
            "expected use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False})",
        )
        both = attend_both(q, k, v, scale=scale, **blocks, **past)
        one, two = factor * both.full, factor * both.sparse
        compared = (one, two) if self.options.place == "post_gate" else (both.full, both.sparse)
        found = self._distance(*compared, past["padding"])
        if not self.again:
            self.losses[layer] = found
        return one if full else two

    def _distance(self, full: Tensor, sparse: Tensor, padding: Tensor | None) -> Tensor:
        if full.dtype in (torch.float16, torch.bfloat16):
            full, sparse = full.float(), sparse.float()
        share = 1.0
        if padding is not None:
            # Padded queries are zero in both, and are not counted.
            share = padding[:, -full.shape[2] :].float().mean().clamp(min=1e-9)
        options = self.options
        form = {"form": options.form, "beta": options.beta}
        if options.w_sparsity == options.w_commit:
            # One plain distance has the gradient of both directions, and half of their value.
            plain = distance(full, sparse, **form)
            return options.w_sparsity * (plain + plain.detach()) / share
        weights = {"full_weight": options.w_sparsity, "sparse_weight": options.w_commit}
        return alignment_loss(full, sparse, **weights, **form).total / share


def coins(layers: list[int], p_full: float, seed: int, step: int, kind: str) -> dict[int, bool]:
    """Full attention or not for each layer, from (seed, step) alone: the same on all processes and when recomputed."""
    number("p_full", p_full, low=0, high=1)
    checks.seed("seed", seed)
    number("step", step, low=0, integer=True)
    draws = np.random.default_rng([seed, step]).random(1 + len(layers))
    return {
        layer: bool(draws[0 if kind == "step" else 1 + place] < p_full) for place, layer in enumerate(layers)
    }
