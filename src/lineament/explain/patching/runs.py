"""The two runs that every patching method begins with, and forwards that start in the middle of the model.

Patching a layer changes nothing before it. Such a forward therefore starts from the residual stream that the base run had at that layer: the blocks before
it are skipped, and the patches of many nodes stand side by side as rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.sites import main_tensor
from lineament.core.sites.hooks import RECORD, Function, replace, tap, watch
from lineament.core.sites.naming import Site
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import PromptPair

# The tensor of a site by the site's key.
Values = dict[tuple[int, str], Tensor]
# Rows of a batch beyond which larger batches no longer pay on a CPU, in tokens.
TOKENS_AT_ONCE = 4096


class Runs:
    """One model, one pair of prompts and one metric: the base run, which is patched, and the source run, from which patches are taken."""

    def __init__(
        self, model: nn.Module, pair: PromptPair, metric: Metric, blocks: Sequence[Site], *, denoising: bool
    ):
        self.model, self.pair, self.metric, self.blocks = model, pair, metric, list(blocks)
        self.base_inputs = pair.corrupt if denoising else pair.clean
        self.source_inputs = pair.clean if denoising else pair.corrupt
        self.other = "clean" if denoising else "corrupt"
        self._streams: list[Tensor] = []
        self._last_output: Any = None

    @property
    def batch(self) -> int:
        return len(self.base_inputs)

    @property
    def rows_at_once(self) -> int:
        """How many times over the base inputs go into one forward."""
        shape = self.base_inputs.shape
        return max(1, TOKENS_AT_ONCE // (shape[0] * (shape[1] if self.pair.language else 1)))

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

    def check_apart(self, base: Tensor, source: Tensor) -> None:
        """Refuse runs whose metrics differ too little to divide by."""
        base, source = base.mean(), source.mean()
        require(
            abs(float(source) - float(base)) >= 1e-4,
            f"metric: {float(source):.6g} on the {self.other} run and {float(base):.6g} on the base run are alike (less than 1e-4 apart), so that scores cannot "
            "be divided by their difference; choose pairs or a metric that tell them apart, or normalise=False",
        )

    def masked(self, difference: Tensor) -> Tensor:
        """A difference of activations, zero at padding."""
        return difference if self.pair.mask is None else difference * self.pair.mask[..., None]

    def values(self, inputs: Tensor, sites: Iterable[Site], *, keep: bool = False) -> tuple[Values, Tensor]:
        """What passes at each site, and the metric; ``keep`` also the residual stream at the blocks, for later starts."""
        seen: Values = {}
        wanted = {site.key: site.whole for site in sites}

        def recorder(site: Site) -> Callable[[Tensor], None]:
            def see(tensor: Tensor) -> None:
                check_once(site, seen)
                # A copy: in-place operations further on must not change it.
                seen[site.key] = tensor.detach().clone()

            return see

        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(tap(self.model, {site: recorder(site) for site in wanted.values()}))
            if keep and self.blocks:
                self._streams = []

                def enter(x: Tensor) -> None:
                    self._streams.append(x.clone())

                stack.enter_context(tap(self.model, {block.input: enter for block in self.blocks}))
                watch(self.blocks[-1], lambda output: setattr(self, "_last_output", output), stack, RECORD)
                stack.enter_context(tap(self.model, {self.blocks[-1]: enter}))
            score = self.judge(self.pair.call(self.model, inputs))[0]
        for site in wanted.values():
            check_reached(site, seen)
        return seen, score

    def stream(self, start: int, times: int) -> Tensor:
        """The residual stream that enters block ``start`` in the base run, ``times`` over."""
        one = self._streams[start]
        return one.repeat(times, *[1] * (one.ndim - 1))

    def patched(
        self,
        start: int | None,
        times: int,
        changes: Mapping[Site, Function],
        stream: Tensor | None = None,
    ) -> Tensor:
        """The metric (times, batch) of the base inputs ``times`` over, from block ``start`` on, with changes on the way.

        Args:
            stream: another residual stream than the base run's to start from.
        """
        with ExitStack() as stack:
            if start is not None:
                stream = self.stream(start, times) if stream is None else stream
                stack.enter_context(self._started(start, stream))
            stack.enter_context(replace(self.model, changes))
            return self.judge(self.pair.call(self.model, self.base_inputs, times), times)

    @contextmanager
    def _started(self, start: int, stream: Tensor) -> Iterator[None]:
        """The blocks before ``start`` do nothing but return ``stream``."""
        path, _ = main_tensor.find(self._last_output) or ((), stream)
        output = main_tensor.put(self._last_output, path, stream)
        with ExitStack() as stack:
            if start == 0:
                stack.enter_context(replace(self.model, {self.blocks[0].input: lambda _: stream}))
            for block in self.blocks[:start]:
                stack.enter_context(_forward_of(block.module, lambda *_, **__: output))
            yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = dict(vars(module))
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if "forward" in before:
            vars(module)["forward"] = before["forward"]


def check_once(site: Site, seen: Values) -> None:
    require(
        site.key not in seen,
        f"sites: {site.name!r} ran twice in one forward, so that it is no one place; patch a module inside it",
    )


def check_reached(site: Site, seen: Values) -> None:
    require(site.key in seen, f"sites: {site.name!r} was not reached in the forward")


def receiving(tensor: Tensor, receive: Callable[[Tensor], object]) -> Tensor:
    """The tensor with a node of the graph of its own; ``receive`` gets the coefficient that comes back to it."""
    if not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    onward = tensor.clone()

    def hook(gradient: Tensor) -> None:
        receive(gradient)

    onward.register_hook(hook)
    return onward
