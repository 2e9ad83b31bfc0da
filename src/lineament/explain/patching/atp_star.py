"""AtP*: two fixes of attribution patching where its linear guess fails, for gradients and for LRP coefficients alike.

Kramár, Lieberum, Shah, Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour to components", 2024 (arXiv 2403.00745). The **QK fix**
recomputes the attention for a patched query or key and is linear only behind it, because a saturated softmax has no gradient to speak of. **GradDrop** keeps
effects that cancel between paths from vanishing: it averages sizes over backward passes, in each of which one block hands its gradient on by the residual stream alone.
The attention is recomputed by the module itself, so that rotary embeddings, grouped heads, windows and soft caps are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lineament.core.checks import InputError, require, show
from lineament.core.models import unwrapped
from lineament.core.sites.hooks import RECORD, replace, tap, watch
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.components import Component
from lineament.explain.patching.runs import Values, receiving
from lineament.explain.relevance.functions import wide


class GradDrop:
    """Backward passes in each of which one block sends no coefficient into its attention and MLP."""

    def __init__(self, blocks: Sequence[Site]):
        require(
            len(blocks) > 1,
            f"grad_drop: got a model with {len(blocks)} known blocks, expected at least two; where sites are named, name them under 'blocks'",
        )
        self.blocks = list(blocks)
        self.dropped: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Set the hooks; after those that record, so that these see what a block's own input and output receive."""
        entered: dict[int, Tensor] = {}

        def before(k: int, x: Tensor) -> None:
            entered[k] = x

        def after(k: int, y: Tensor) -> Tensor:
            x = entered.pop(k, None)
            if x is None or x.shape != y.shape:
                raise InputError(
                    f"grad_drop: block {k} takes {show(x)} and returns {show(y)}, expected a residual stream of one shape"
                )
            return _Skipped.apply(x, y, self, k)  # pyright: ignore[reportReturnType]

        with ExitStack() as stack:
            stack.callback(entered.clear)
            for k, block in enumerate(self.blocks):
                stack.enter_context(tap(block.module, {block.input: partial(before, k)}))
                stack.enter_context(replace(block.module, {block: partial(after, k)}))
            yield

    def passes(self, component: Component) -> int:
        """The backward passes that reach a component: the one that drops its own block does not, unless it is the residual stream at its edge."""
        module = component.write.module
        edge = any(module is block.module for block in self.blocks)
        inside = any(part is module for block in self.blocks for part in block.module.modules())
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
    components: list[tuple[int, Component, str]] = field(default_factory=list)


class QKFix:
    """The effect of queries and keys with the attention recomputed: Σ_t (z_t(patched) - z_t)·c_t, c the coefficient of the mixed values z."""

    def __init__(self, model: nn.Module, components: Sequence[Component]):
        modules = {name: unwrapped(module) for name, module in unwrapped(model).named_modules()}
        self.attentions: dict[str, _Attention] = {}
        for index, component in enumerate(components):
            view = component.read.view
            name, _, part = component.read.name.rpartition(":")
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
            found.components.append((index, component, part[0]))
        require(
            bool(self.attentions),
            "qk_fix: none of the sites is a query or a key, and other sites need no fix; add 'q' and 'k' to sites",
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record each attention's call, mixed values and coefficients of the forward and the backward to come."""

        def called(attention: _Attention, call: Any) -> None:
            attention.call = call

        def mixed(attention: _Attention, z: Tensor) -> Tensor:
            attention.mixed = z.detach()
            return receiving(z, lambda c: setattr(attention, "coefficient", c.detach()))

        with ExitStack() as stack:
            for attention in self.attentions.values():
                watch(Site("", attention.module, "in"), partial(called, attention), stack, RECORD)
                stack.enter_context(tap(attention.module, {attention.z.whole: partial(mixed, attention)}))
            yield

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
        differences: Values,
        picks: Sequence[int | None],
    ) -> dict[int, Float[Tensor, "passes batch picks units"]]:
        """The effect at every query and key, by the component's index: one forward of the attention for all queries, one for each key position."""
        found = {}
        for name, attention in self.attentions.items():
            view: Any = attention.z.view
            c = torch.stack([wide(view.read(each[name])) for each in passes])
            for index, component, part in attention.components:
                mine: Any = component.read.view
                move = differences[component.read.key]
                if part == "q":
                    change = self._moved(attention, component.read, move)
                    by_query = torch.einsum("pbtns,btns->pbtn", c, change)
                    by_head = torch.stack(
                        [by_query.sum(2) if at is None else by_query[:, :, at] for at in picks], 2
                    )
                else:
                    columns = []
                    for at in picks:
                        moved = move
                        if at is not None:
                            moved = torch.zeros_like(move)
                            moved[:, at] = move[:, at]
                        if bool(mine.read(moved).any()):
                            change = self._moved(attention, component.read, moved)
                            columns.append(torch.einsum("pbtns,btns->pbn", c, change))
                        else:
                            columns.append(c.new_zeros(*c.shape[:2], c.shape[3]))
                    by_head = torch.stack(columns, 2)
                # Heads that share a key are patched together.
                groups = mine.heads if mine.only is None else 1
                found[index] = by_head.unflatten(-1, (groups, -1)).sum(-1)
        return found

    def _moved(
        self, attention: _Attention, site: Site, move: Tensor
    ) -> Float[Tensor, "batch positions heads size"]:
        """The change of the mixed values when these queries or keys move, everything else as in the base run."""
        seen: list[Tensor] = []
        view: Any = site.view
        args, kwargs = attention.call
        with (
            replace(attention.module, {site: lambda heads: heads + view.read(move).to(heads.dtype)}),
            tap(attention.module, {attention.z: seen.append}),
        ):
            attention.module(*args, **kwargs)
        before: Any = attention.z.view
        return wide(seen[0]) - wide(before.read(attention.mixed))
