"""Forwards that begin at a site: what every module before it returned is remembered once and returned again, for as many copies of the batch as are asked for.

What a model does outside its modules (adding a residual stream, building a mask) still runs, which costs little. Any model will do whose modules return
tensors with the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require
from lineament.core.models import unwrapped
from lineament.core.sites.hooks import RECORD, eagerly, tap, watch
from lineament.core.sites.naming import Site, resolve


class FromSite:
    """What lies before a site, for these inputs.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> x, calls = torch.ones(3, 2), []
    >>> start = FromSite(net, "1", x, lambda x: net(x))
    >>> with start.replayed(2), tap(net, {"0:in": lambda t: calls.append(len(t)), "2:in": lambda t: calls.append(len(t))}):
    ...     again = net(x.repeat(2, 1))
    >>> torch.equal(again, net(x).repeat(2, 1)), start.skipped, start.value.shape
    (True, ['0', '1'], torch.Size([3, 2]))

    Attributes:
        value: what passed at the site. output: what the call returned. skipped: the modules that do not run again.
    """

    def __init__(self, model: nn.Module, site: str | Site, inputs: Any, call: Callable[[Any], Any]):
        """Runs ``call(inputs)``, without gradients; ``call`` must call ``model`` once.

        Raises:
            InputError: an unknown site, several, or one that is not reached or reached twice.
        """
        self.model = unwrapped(model)
        self.site = site if isinstance(site, Site) else _one(model, site)
        self._done: list[tuple[nn.Module, Any]] = []
        seen: list[Tensor] = []

        def reached(value: Tensor) -> None:
            require(
                not seen,
                f"site {self.site.name!r} is reached twice in one forward, so that none begins there",
            )
            seen.append(value.detach().clone())

        with torch.no_grad(), ExitStack() as stack:
            # Before the hook at the site, so that a module whose output is the site counts as done.
            for name, module in self.model.named_modules():
                if module is not self.model:
                    see = self._recorder(module, seen)
                    watch(Site(name, module), see, stack, RECORD)
            stack.enter_context(tap(self.model, {self.site.whole: reached}))
            stack.enter_context(eagerly())
            self.output = call(inputs)
        require(bool(seen), f"site {self.site.name!r} was not reached in the forward")
        self.value = seen[0]
        self.batch = len(self.value)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.skipped = [names[id(module)] for module, _ in self._done]

    def _recorder(self, module: nn.Module, seen: list[Tensor]) -> Callable[[Any], None]:
        inside = {id(part) for part in module.modules() if part is not module}

        def see(output: Any) -> None:
            if not seen:
                # What it called is inside it, and need not be remembered by itself.
                while self._done and id(self._done[-1][0]) in inside:
                    self._done.pop()
                self._done.append((module, _copied(output, 1, -1)))

        return see

    @contextmanager
    def replayed(self, times: int) -> Iterator[None]:
        """A block in which the model, called with ``times`` copies of the inputs one after the other, begins at the site."""
        queues: dict[int, list[Any]] = {}
        for module, output in self._done:
            queues.setdefault(id(module), []).append(output)
        modules = {id(module): module for module, _ in self._done}
        before: dict[int, Any] = {}
        try:
            for key, module in modules.items():
                before[key] = vars(module).get("forward")
                vars(module)["forward"] = self._replay(module, queues[key], times)
            with eagerly():
                yield
        finally:
            for key, forward in before.items():
                if forward is None:
                    del vars(modules[key])["forward"]
                else:
                    vars(modules[key])["forward"] = forward

    def _replay(self, module: nn.Module, outputs: list[Any], times: int) -> Callable[..., Any]:
        own, calls = module.forward, iter(outputs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for output in calls:
                return _copied(output, times, self.batch)
            return own(*args, **kwargs)

        return forward


def _one(model: nn.Module, site: str) -> Site:
    found = resolve(model, site)
    if len(found) != 1:
        raise InputError(f"site: {site!r} names {len(found)} places ({', '.join(found)}), expected one")
    return next(iter(found.values()))


def _copied(value: Any, times: int, batch: int) -> Any:
    """A copy of whatever a module returns, that in-place operations may change; tensors of ``batch`` rows ``times`` over."""
    if isinstance(value, Tensor):
        value = value.detach()
        return (
            value.repeat(times, *[1] * (value.ndim - 1))
            if value.ndim and len(value) == batch
            else value.clone()
        )
    if isinstance(value, dict):
        made = {key: _copied(member, times, batch) for key, member in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if isinstance(value, (tuple, list)):
        items = [_copied(member, times, batch) for member in value]
        make: Any = getattr(type(value), "_make", type(value))
        return make(items)
    return value
