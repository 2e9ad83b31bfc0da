"""The two runs that every patching method begins with, and forwards that start in the middle of the model.

Patching a layer changes nothing before it. Such a forward therefore starts from the cached residual stream of that layer: the blocks before it
hand on what they are given, and the last of them hands on the cached stream, with the patches of many nodes side by side as rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.sites import main_tensor
from lineament.core.sites.hooks import eagerly, watch
from lineament.core.sites.naming import Site
from lineament.explain.patching.inputs import Pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.sites import Place, flat

Change = Callable[[Tensor], Tensor]


class Engine:
    """One model, one pair of prompts and one metric: the base run, the source of patches, and what their difference is worth."""

    def __init__(
        self,
        model: nn.Module,
        pair: Pair,
        metric: Metric,
        places: Sequence[Place],
        blocks: Sequence[nn.Module],
        *,
        denoising: bool,
    ):
        self.model, self.pair, self.metric = model, pair, metric
        self.places, self.blocks = list(places), list(blocks)
        self.base_inputs = pair.corrupt if denoising else pair.clean
        self.source_inputs = pair.clean if denoising else pair.corrupt
        self.stages: dict[int, Tensor] = {}
        self.outputs: dict[int, Any] = {}

    @property
    def batch(self) -> int:
        return len(self.base_inputs)

    def judge(self, logits: Tensor, times: int = 1) -> Tensor:
        """The metric of each row, (times, batch)."""
        values = []
        for part in logits.unflatten(0, (times, self.batch)):
            value = self.metric(part)
            if not isinstance(value, Tensor) or value.shape != (self.batch,):
                raise InputError(
                    f"metric: returned {show(value)}, expected one number for each of the {self.batch} examples, of shape ({self.batch},)"
                )
            values.append(value)
        return torch.stack(values)

    def values(self, inputs: Tensor, *, keep: bool = False) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
        """What passes at every place (read side) and the metric; ``keep`` also the residual stream at the blocks, for later starts."""
        seen: dict[tuple[int, str], Tensor] = {}
        sites = {(id(p.read.module), p.read.side): p.read for p in self.places}
        with torch.no_grad(), ExitStack() as stack:
            for key, site in sites.items():
                watch(Site(site.name, site.module, site.side), _keeper(site, key, seen), stack, last=True)
            if keep:
                self._keep_stages(stack)
            stack.enter_context(eagerly())
            score = self.judge(self.pair.call(self.model, inputs))[0]
        for site in sites.values():
            require(
                (id(site.module), site.side) in seen,
                f"sites: {site.name!r} was not reached in the forward, or passed no tensor",
            )
        return seen, score

    def forward(
        self,
        start: int | None,
        times: int,
        stream: Tensor | None,
        changes: Mapping[tuple[int, str], tuple[Site, Change]],
    ) -> Tensor:
        """The metric (times, batch) of the base inputs ``times`` over, from block ``start`` on with this residual stream, with changes on the way."""
        with ExitStack() as stack:
            if stream is not None and start is not None:
                stack.enter_context(self._started(start, stream))
            for site, change in changes.values():
                watch(Site(site.name, site.module, site.side), _changer(site, change), stack, last=False)
            stack.enter_context(eagerly())
            return self.judge(self.pair.call(self.model, self.base_inputs, times), times)

    def _keep_stages(self, stack: ExitStack) -> None:
        def keeper(k: int) -> Callable[[Any], None]:
            def see(value: Any) -> None:
                found = main_tensor.find(value)
                if found is None:
                    raise InputError(f"layout: block {k} passes {show(value)}, which holds no tensor")
                self.stages[k] = found[1].detach().clone()
                self.outputs[k] = value

            return see

        for k, block in enumerate(self.blocks):
            watch(Site(f"block {k}", block, "in"), keeper(k), stack, last=True)
        if self.blocks:
            watch(Site("the last block", self.blocks[-1], "out"), keeper(len(self.blocks)), stack, last=True)

    @contextmanager
    def _started(self, start: int, stream: Tensor) -> Iterator[None]:
        """The blocks before ``start`` do nothing but let the last of them return ``stream``."""
        template = self.outputs[len(self.blocks)]
        found: Any = main_tensor.find(template)

        def returned(value: Tensor) -> Any:
            return main_tensor.replace(template, found[0], value)

        with ExitStack() as stack:
            if start == 0:
                site = Site("the first block", self.blocks[0], "in")
                watch(site, lambda value: _put(value, stream), stack, last=False)
            for k, block in enumerate(self.blocks[:start]):
                stack.enter_context(
                    _replaced(block, _handing_on(returned, stream if k == start - 1 else None))
                )
            yield


def tapped(value: Any, contract: Callable[[Tensor], None]) -> Any:
    """What passes at a site with a node of the graph of its own; ``contract`` sees the coefficient that comes back to it."""
    found = main_tensor.find(value)
    if found is None:
        raise InputError(f"sites: a site passed {show(value)}, which holds no tensor")
    path, tensor = found
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    onward = tensor.clone()
    onward.register_hook(contract)
    return main_tensor.replace(value, path, onward)


def _keeper(site: Site, key: tuple[int, str], seen: dict[tuple[int, str], Tensor]) -> Callable[[Any], None]:
    def see(value: Any) -> None:
        found = main_tensor.find(value)
        if found is None:
            return
        if key in seen:
            raise InputError(
                f"sites: {site.name!r} ran twice in one forward, so that it is no one place; patch a module inside it"
            )
        # A copy: in-place operations further on must not change it.
        seen[key] = found[1].detach().clone()

    return see


def _changer(site: Site, change: Change) -> Callable[[Any], Any]:
    def see(value: Any) -> Any:
        found = main_tensor.find(value)
        if found is None:
            raise InputError(f"sites: {site.name!r} passed {show(value)}, which holds no tensor")
        return main_tensor.replace(value, found[0], change(found[1]))

    return see


def _put(value: Any, stream: Tensor) -> Any:
    found: Any = main_tensor.find(value)
    return main_tensor.replace(value, found[0], stream)


def _handing_on(returned: Callable[[Tensor], Any], stream: Tensor | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if stream is not None:
            return returned(stream)
        found: Any = main_tensor.find((args, kwargs))
        return returned(found[1])

    return forward


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    had, before = "forward" in vars(module), vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if had:
            vars(module)["forward"] = before
        else:
            del vars(module)["forward"]


def column_of(place: Place, device: torch.device) -> Tensor | None:
    """The columns of each head, (heads, size), for places with heads."""
    if place.read.view is None:
        return None
    return place.read.view._columns(device).reshape(-1, place.read.view.size)


def contracted(place: Place, product: Tensor) -> Tensor:
    """Sums of a product of the read side's shape over what makes one node: (batch, positions) or (batch, positions, units)."""
    if place.units == "head" and place.read.view is not None:
        heads = place.read.view.read(flat(product))
        return heads.sum(-1) if place.read.view.only is None else heads.sum(-1, keepdim=True)
    return flat(product) if place.units == "feature" else flat(product).sum(-1)
