"""AtP*: two mends of attribution patching where its linear guess fails, for gradients and for LRP coefficients alike.

Kramár, Lieberum, Shah, Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024 (arXiv 2403.00745). The **QK fix**
recomputes the attention for a patched query or key and is linear only behind it, because a saturated softmax has no gradient to speak of. **GradDrop** keeps
effects that cancel between paths from vanishing: it averages sizes over backward passes, in each of which one block hands its gradient on by the residual stream alone.
The attention is recomputed by the module itself, so that rotary embeddings, grouped heads, windows and soft caps are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lineament.core.checks import InputError, require, show
from lineament.core.sites import main_tensor
from lineament.core.sites.heads import HeadView, plain
from lineament.core.sites.hooks import eagerly, watch
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.engine import tapped
from lineament.explain.patching.sites import Place
from lineament.explain.relevance.functions import wide


class GradDrop:
    """Backward passes in each of which one block sends no coefficient into its attention and MLP."""

    def __init__(self, blocks: Sequence[nn.Module]):
        require(
            len(blocks) > 1,
            f"grad_drop: got a model with {len(blocks)} known blocks, expected at least two; with a layout, name them under 'blocks'",
        )
        self.blocks = list(blocks)
        self.dropped: int | None = None

    def watch(self, stack: ExitStack) -> None:
        """Set the hooks; call it after those that record, so that they see what a block's own input and output receive."""

        def keeper(k: int, kept: dict[int, Tensor]) -> tuple[Any, Any]:
            def before(value: Any) -> None:
                found = main_tensor.find(value)
                if found is not None:
                    kept[k] = found[1]

            def after(value: Any) -> Any:
                found = main_tensor.find(value)
                x = kept.pop(k, None)
                if found is None or x is None or x.shape != found[1].shape:
                    raise InputError(
                        f"grad_drop: block {k} takes {show(x)} and returns {show(value)}, expected a residual stream of one shape"
                    )
                return main_tensor.replace(value, found[0], _Skipped.apply(x, found[1], self, k))

            return before, after

        kept: dict[int, Tensor] = {}
        stack.callback(kept.clear)
        for k, block in enumerate(self.blocks):
            before, after = keeper(k, kept)
            watch(Site(f"block {k}", block, "in"), before, stack, last=True)
            watch(Site(f"block {k}", block, "out"), after, stack, last=False)

    def passes(self, place: Place) -> int:
        """The backward passes that reach a place: the one that drops its own block does not, unless it is the residual stream at its edge."""
        edge = any(place.write.module is block for block in self.blocks)
        inside = any(part is place.write.module for block in self.blocks for part in block.modules())
        return len(self.blocks) - int(inside and not edge)


class _Skipped(torch.autograd.Function):
    """A block's output y as it is; in the pass that drops the block, the coefficient goes to its input x instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, state: GradDrop, index: int) -> Tensor:
        ctx.state, ctx.index = state, index
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.state.dropped != ctx.index:
            return None, grads[0], None, None
        return grads[0], torch.zeros_like(grads[0]), None, None


@dataclass
class _Attention:
    """An attention module of the base run: how it was called, the mixed values it made and the coefficients that came back to them."""

    module: nn.Module
    z: Site
    call: tuple[Any, Any] = ((), {})
    mixed: Tensor | None = None
    coefficient: Tensor | None = None
    places: list[tuple[int, Place, str]] = field(default_factory=list)


class QKFix:
    """The effect of queries and keys with the attention recomputed: Σ_t (z_t(patched) - z_t)·c_t, c the coefficient of the mixed values z."""

    def __init__(self, model: nn.Module, places: Sequence[Place]):
        modules = {name: plain(module) for name, module in plain(model).named_modules()}
        self.attentions: dict[str, _Attention] = {}
        for index, place in enumerate(places):
            view = place.read.view
            name, _, part = place.read.name.rpartition(":")
            if view is None or part[:1] not in ("q", "k"):
                continue
            module = modules[name]
            for norm in ("q_norm", "k_norm"):
                weight = getattr(getattr(module, norm, None), "weight", None)
                require(
                    weight is None or weight.numel() == view.size,
                    f"qk_fix: {name!r} normalises all heads together, so that no head can be patched by itself; give qk_fix=False",
                )
            found = self.attentions.setdefault(
                name, _Attention(module, resolve(model, [f"{name}:z"])[f"{name}:z"])
            )
            found.places.append((index, place, part[0]))
        require(
            bool(self.attentions),
            "qk_fix: none of the sites is a query or a key, and other sites need no fix; add 'q' and 'k' to sites",
        )

    def watch(self, stack: ExitStack) -> None:
        """Record each attention's call, mixed values and coefficients of the forward and the backward to come."""
        for name, attention in self.attentions.items():

            def called(value: Any, attention: _Attention = attention) -> None:
                attention.call = value

            def mixed(value: Any, attention: _Attention = attention) -> Any:
                def back(gradient: Tensor) -> None:
                    attention.coefficient = gradient.detach()

                found: Any = main_tensor.find(value)
                attention.mixed = found[1].detach()
                return tapped(value, back)

            watch(Site(name, attention.module, "in"), called, stack, last=True)
            watch(Site(name, attention.z.module, attention.z.side), mixed, stack, last=True)

    def coefficients(self) -> dict[str, Tensor]:
        """What the last backward pass brought to each attention's mixed values; forgotten here."""
        found = {}
        for name, attention in self.attentions.items():
            require(attention.mixed is not None, f"qk_fix: {name!r} did not run in the forward")
            assert attention.mixed is not None
            back = attention.coefficient
            found[name] = torch.zeros_like(attention.mixed) if back is None else back
            attention.coefficient = None
        return found

    @torch.no_grad()
    def scores(
        self,
        passes: Sequence[Mapping[str, Tensor]],
        differences: Mapping[tuple[int, str], Tensor],
        picks: Sequence[int | None],
    ) -> dict[int, Float[Tensor, "passes batch picks units"]]:
        """The effect at every query and key place, by the place's index: one forward of the attention for all queries, one for each key position."""
        found = {}
        for name, attention in self.attentions.items():
            view: Any = attention.z.view
            c = torch.stack([wide(view.read(each[name])) for each in passes])
            for index, place, part in attention.places:
                mine: Any = place.read.view
                move = differences[id(place.read.module), place.read.side]
                if part == "q":
                    by_head = torch.einsum("pbtns,btns->pbtn", c, self._moved(attention, mine, move))
                    by_head = (
                        by_head.sum(2, keepdim=True) if list(picks) == [None] else by_head[:, :, list(picks)]
                    )
                else:
                    columns = []
                    for at in picks:
                        moved = move if at is None else torch.zeros_like(move).index_copy(1, *_only(move, at))
                        if bool(mine.read(moved).any()):
                            columns.append(
                                torch.einsum("pbtns,btns->pbn", c, self._moved(attention, mine, moved))
                            )
                        else:
                            columns.append(c.new_zeros(*c.shape[:2], c.shape[3]))
                    by_head = torch.stack(columns, 2)
                # Heads that share a key are patched together.
                groups = mine.heads if mine.only is None else 1
                found[index] = by_head.unflatten(-1, (groups, -1)).sum(-1)
        return found

    def _moved(
        self, attention: _Attention, view: HeadView, move: Tensor
    ) -> Float[Tensor, "batch positions heads size"]:
        """The change of the mixed values when these queries or keys move, everything else as in the base run."""
        seen: list[Tensor] = []

        def change(value: Any) -> Any:
            path, wide_value = main_tensor.find(value) or ((), move)
            new = view.write(wide_value, view.read(wide_value + move.to(wide_value.dtype)))
            return main_tensor.replace(value, path, new)

        def see(value: Any) -> None:
            found: Any = main_tensor.find(value)
            seen.append(found[1])

        args, kwargs = attention.call
        with ExitStack() as stack:
            watch(Site("query or key", view.module, view.side), change, stack, last=False)
            watch(Site("mixed values", attention.z.module, attention.z.side), see, stack, last=True)
            stack.enter_context(eagerly())
            attention.module(*args, **kwargs)
        mixed: Any = attention.mixed
        heads: Any = attention.z.view
        return wide(heads.read(seen[0])) - wide(heads.read(mixed))


def _only(move: Tensor, at: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([at], device=move.device), move[:, at : at + 1]
