"""Name places in a network; record, replace and differentiate what passes there.

A **site** is a module's name as ``named_modules()`` gives it, with ``:in`` or ``:out`` (the default) for the side:
``"layer4"``, ``"layer4:in"``; ``""`` is the model's own output and ``":in"`` its input. ``*``, ``?`` and ``[...]`` are
globs (``*`` also crosses dots: ``"h.*.mlp"``). Attention blocks of known families have ``:q``, ``:k``, ``:v`` and
``:z``, (batch, position, head, size), and single heads, ``"h.0.attn:z[3]"`` (see :mod:`lineament.core.heads`).

What is recorded is a copy made when it passes, so that no in-place operation further on (``nn.ReLU(inplace=True)``,
``out += identity``) changes it; a copy costs little beside the module that made the values. Inside the blocks
everything that ``torch.compile`` made runs eagerly, because compiled code does not look for new hooks.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import payload
from lineament.core.checks import InputError, require, show, suggest
from lineament.core.heads import PARTS, HeadView, head_view, plain
from lineament.core.models import device_of, frozen

_SUFFIX = re.compile(r"^(?P<name>.*):(?P<side>in|out|[qkvz])(\[(?P<head>\d+)\])?$", re.DOTALL)


@dataclass(frozen=True)
class Site:
    """A resolved site: the module to watch, its side, and the head view where the site is one."""

    name: str
    module: nn.Module
    side: str
    view: HeadView | None = None


def sites(model: nn.Module, pattern: str = "*") -> list[str]:
    """The names of the sites that a pattern matches, in the order of ``named_modules()``.

    Args:
        model: any module; names inside compiled models come without ``_orig_mod``.
        pattern: a site or a glob, with its suffix (``"h.*.mlp:in"``, ``"*:z"``); ``"*"`` is every module but the model.

    Raises:
        InputError: no site has this name or matches; the message names the nearest.

    >>> sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*:in")
    ['0:in', '1:in']
    """
    return list(_resolve(model, pattern))


class Activations(Mapping[str, Tensor]):
    """What passed at each site during the last forward: a mapping from the site's name to its tensor."""

    def __init__(self, places: Mapping[str, Site], gradients: bool, stop_early: bool):
        self._places = dict(places)
        self._gradients = gradients
        self._stop_early = stop_early
        self._calls: dict[str, list[Tensor | str]] = {name: [] for name in places}
        self._missing = set(places)
        self._open = True
        self._depth = 0
        self._started = False

    def __getitem__(self, site: str) -> Tensor:
        calls = self.calls(site)
        require(
            len(calls) == 1,
            f"site {site!r} was reached {len(calls)} times in this forward, so that there is no one tensor; "
            f"use .calls({site!r}), which lists all of them",
        )
        return calls[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, str) and self._key(site) is not None

    def calls(self, site: str) -> list[Tensor]:
        """Every tensor that passed at the site in the last forward, in the order of the calls.

        Raises:
            InputError: the site was not asked for, its module never ran, or it returned no tensor.
        """
        key = self._key(site)
        if key is None:
            raise UnknownSite(f"site {site!r} was not captured{suggest(str(site), self._places)}")
        found: list[Tensor] = []
        for value in self._calls[key]:
            if isinstance(value, str):
                raise InputError(f"site {site!r}: {value}")
            found.append(payload.settle(value))
        if not found:
            place = self._places[key]
            raise InputError(
                f"site {site!r} was not reached: {type(place.module).__name__} did not run in the last forward "
                "(no forward yet, a branch not taken, or code that calls its parts and not the module)"
            )
        return found

    def gradients(self, score: Tensor) -> dict[str, Tensor]:
        """The gradient of a scalar with respect to what passed at each site: {site: d score / d activation}.

        A site on which the score does not depend has a gradient of zero. Can be called again with other scores of the same forward.

        Args:
            score: a tensor with one element, computed from the model's output or from the captured tensors.

        Raises:
            InputError: not captured with ``gradients=True``, under ``no_grad``, not a scalar, or a site reached twice.
        """
        require(self._gradients, "gradients: the sites were captured without gradients=True")
        require(
            isinstance(score, Tensor) and score.numel() == 1,
            f"score: got {show(score)}, expected a tensor with one element; sum it or choose one",
        )
        require(
            score.requires_grad,
            "score: it does not depend on anything that asks for gradients; was the forward run under torch.no_grad()?",
        )
        tensors = {name: self[name] for name in self._places}
        for name, tensor in tensors.items():
            require(
                tensor.requires_grad,
                f"site {name!r} holds {show(tensor)} without gradient "
                "(an integer tensor, or a forward under torch.no_grad())",
            )
        found = torch.autograd.grad(
            score.reshape(()),
            list(tensors.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(tensors, found))

    def _key(self, site: str) -> str | None:
        """The name under which a site was asked for: ``"fc"`` and ``"fc:out"`` are the same place."""
        other = site.removesuffix(":out") if site.endswith(":out") else f"{site}:out"
        return next((name for name in (site, other) if name in self._places), None)

    def _restart(self) -> None:
        self._started = True
        self._missing = set(self._places)
        for calls in self._calls.values():
            calls.clear()

    def _record(self, site: Site, value: Tensor | str) -> None:
        # What runs outside the model's own forward once that has run (a checkpointed segment in the backward
        # pass, say) is no part of it.
        if self._started and not self._depth:
            return
        self._calls[site.name].append(value)
        self._missing.discard(site.name)
        if self._stop_early and self._depth and not self._missing:
            raise _Reached(self)


class UnknownSite(InputError, KeyError):
    """A site that was not captured; also a ``KeyError``, so that the mapping behaves as one."""

    def __str__(self) -> str:
        return ValueError.__str__(self)


class _Reached(BaseException):
    """Ends a forward once all sites are recorded; no ``Exception``, so that no model code catches it by accident."""

    def __init__(self, activations: Activations):
        self.activations = activations


@contextmanager
def capture(
    model: nn.Module, sites: str | Iterable[str], *, gradients: bool = False, stop_early: bool = False
) -> Iterator[Activations]:
    """Record what passes at some sites while the block runs; every new forward of ``model`` starts afresh.

    A site whose module takes or returns a tuple, a dict or a dataclass gives its first tensor (``last_hidden_state``,
    ``logits``). A module that runs twice has two :meth:`Activations.calls`. All hooks are removed at the end, also
    after an exception; what was recorded stays readable.

    Args:
        sites: a site or a glob, or several.
        gradients: keep the tensors in the graph, for :meth:`Activations.gradients` or a loss of one's own; also where no
            parameter asks for gradients. Otherwise they are detached.
        stop_early: ``model(x)`` ends as soon as every site was reached once, and returns ``None``.

    Raises:
        InputError: an unknown site; the message names the nearest.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(inplace=True))
    >>> _ = nn.init.constant_(net[0].weight, -1.0)
    >>> with capture(net, "0", gradients=True) as acts:
    ...     score = net(torch.ones(1, 2)).sum()
    >>> acts["0"].tolist(), acts.gradients(score)["0"].tolist()
    ([[-2.0, -2.0]], [[0.0, 0.0]])
    """
    places = _resolve_all(model, sites)
    acts = Activations(places, gradients, stop_early)
    with ExitStack() as stack:
        stack.callback(setattr, acts, "_open", False)
        for place in places.values():
            _watch(place, _observer(acts, place), stack)
        stack.enter_context(_RootCall(plain(model), acts))
        stack.enter_context(_eagerly())
        yield acts


def record(model: nn.Module, inputs: Any, sites: str | Iterable[str]) -> dict[str, Tensor]:
    """What passes at some sites for these inputs: one forward without gradients, in eval mode, no further than needed.

    Args:
        inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; tensors are
            moved to the model's device.

    >>> record(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.zeros(5, 2, 2), "0")["0"].shape
    torch.Size([5, 4])
    """
    device = device_of(model)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    with frozen(model, requires_grad=None), torch.no_grad(), capture(model, sites, stop_early=True) as acts:
        if isinstance(inputs, Mapping):
            model(**{key: moved(value) for key, value in inputs.items()})
        elif isinstance(inputs, (tuple, list)):
            model(*map(moved, inputs))
        else:
            model(moved(inputs))
    return dict(acts)


@contextmanager
def patch(
    model: nn.Module, changes: Mapping[str, Tensor | float | Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Replace what passes at some sites while the block runs, by a value or by a function of what passes.

    Other members of a tuple, dict or dataclass stay. Gradients flow through the new value. Blocks nest: the outer
    change comes first, and a :func:`capture` sees what passes after all changes.

    Args:
        changes: for each site or glob, a number, a tensor that broadcasts to what passes there, or a function that takes
            a copy of it (which it may change in place) and returns such a tensor.

    Raises:
        InputError: an unknown site; during the forward, a value that does not fit, or a site without a tensor.

    >>> net = nn.Sequential(nn.Identity(), nn.Flatten())
    >>> with patch(net, {"0": lambda x: 2 * x, "1:in": lambda x: x + 1}):
    ...     net(torch.ones(1, 2)).tolist()
    [[3.0, 3.0]]
    """
    require(
        isinstance(changes, Mapping), f"changes: got {show(changes)}, expected a mapping from sites to values"
    )
    plans: list[tuple[Site, Any]] = []
    for pattern, change in changes.items():
        fits = callable(change) or isinstance(change, (Tensor, int, float))
        require(
            fits,
            f"site {pattern!r}: got {show(change)}, expected a tensor, a number or a function of a tensor",
        )
        plans += [(place, change) for place in _resolve(model, pattern).values()]
    with ExitStack() as stack:
        for place, change in plans:
            _watch(place, _changer(place, change), stack)
        stack.enter_context(_eagerly())
        yield


def _observer(acts: Activations, site: Site) -> Callable[[Any], Any]:
    """Records what passes; returns what to pass on where that is another tensor, else ``None``."""

    def observe(value: Any) -> Any:
        if not acts._open:
            return None
        found = payload.find(value)
        if found is None:
            acts._record(site, f"{type(site.module).__name__} passed {show(value)}, which holds no tensor")
            return None
        path, tensor = found
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if not acts._gradients or not differentiable or not torch.is_grad_enabled():
            tensor = tensor.detach()
            acts._record(site, tensor.clone() if site.view is None else site.view.read(tensor))
            return None
        # A node of its own on the way (so that only this way counts), and another copy behind it: an in-place
        # operation then changes the copy, and never the recorded tensor or its place in the graph.
        seen = tensor.clone() if site.view is None else site.view.read(tensor)
        if not seen.requires_grad and not payload.transforming():
            seen.requires_grad_()
        acts._record(site, seen)
        onward = seen.clone() if site.view is None else site.view.write(tensor, seen)
        return payload.replace(value, path, onward)

    return observe


def _changer(site: Site, change: Any) -> Callable[[Any], Any]:
    def alter(value: Any) -> Any:
        found = payload.find(value)
        if found is None:
            raise InputError(f"site {site.name!r}: {show(value)} passed, which holds no tensor to replace")
        path, tensor = found
        old = tensor if site.view is None else site.view.read(tensor)
        new = _fitted(site.name, old, change)
        return payload.replace(value, path, new if site.view is None else site.view.write(tensor, new))

    return alter


def _fitted(name: str, old: Tensor, change: Any) -> Tensor:
    """The new tensor in the shape, dtype and device of the old one, in memory of its own."""
    own = old.clone() if callable(change) else None
    new = change(own) if callable(change) else change
    if isinstance(new, (int, float)):
        new = torch.as_tensor(new, device=old.device)
    if not isinstance(new, Tensor):
        raise InputError(f"site {name!r}: the function returned {show(new)}, expected a tensor")
    try:
        fits = torch.broadcast_shapes(new.shape, old.shape) == old.shape
    except RuntimeError:
        fits = False
    require(fits, f"site {name!r}: got {show(new)}, expected one that broadcasts to {tuple(old.shape)}")
    require(
        torch.can_cast(new.dtype, old.dtype),
        f"site {name!r}: got {show(new)}, which cannot stand for {show(old)}",
    )
    new = new.to(device=old.device, dtype=old.dtype).expand(old.shape)
    # A caller's tensor must survive in-place operations further on.
    return new if new is own else new.clone()


def _watch(site: Site, see: Callable[[Any], Any], stack: ExitStack) -> None:
    """Call ``see`` with what passes at the site; where it returns something, that passes on instead."""
    module = site.module
    if site.side == "in":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Keyword arguments in the order of the signature: hidden states come before masks, whoever calls.
            named = dict(sorted(kwargs.items(), key=lambda item: _rank(module, item[0])))
            changed = see((args, named))
            return None if changed is None else (changed[0], {**kwargs, **changed[1]})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        hooks: Any = module._forward_pre_hooks
        hook: Any = before
    else:

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return see(output)

        handle = module.register_forward_hook(after)
        hooks, hook = module._forward_hooks, after
    stack.callback(handle.remove)
    # Recording comes after all changes, whichever block was opened first.
    hook.lineament_records = see.__qualname__.startswith("_observer")
    if not hook.lineament_records:
        for key, other in list(hooks.items()):
            if getattr(other, "lineament_records", False):
                hooks.move_to_end(key)


def _rank(module: nn.Module, keyword: str) -> int:
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return 0
    return names.index(keyword) if keyword in names else len(names)


class _RootCall:
    """Stands before the model's ``__call__``: starts the record afresh and ends an early-stopped forward.

    A forward hook cannot end a forward, and a changed ``forward`` would show to the model's own hooks; PyTorch keeps a
    place for another call, which ``Module.compile`` uses.
    """

    def __init__(self, model: nn.Module, acts: Activations):
        self.model, self.acts = model, acts
        self.before: Any = None

    def __enter__(self) -> _RootCall:
        self.before = self.model.__dict__.get("_compiled_call_impl")
        self.had = "_compiled_call_impl" in self.model.__dict__
        self.model.__dict__["_compiled_call_impl"] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self.had:
            self.model.__dict__["_compiled_call_impl"] = self.before
        else:
            del self.model.__dict__["_compiled_call_impl"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        acts = self.acts
        if not acts._depth:
            acts._restart()
        acts._depth += 1
        try:
            return (self.before or self.model._call_impl)(*args, **kwargs)
        except _Reached as reached:
            if reached.activations is not acts or acts._depth > 1:
                raise
            return None
        finally:
            acts._depth -= 1


@contextmanager
def _eagerly() -> Iterator[None]:
    """Run what ``torch.compile`` made as it was written: compiled code neither sees nor looks for new hooks."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _resolve_all(model: nn.Module, patterns: str | Iterable[str]) -> dict[str, Site]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    require(len(wanted) > 0, "sites: got none, expected at least one site or glob")
    places: dict[str, Site] = {}
    for pattern in wanted:
        places.update(_resolve(model, pattern))
    return places


def _modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Every module by each of its names (without compile's prefix), and the configuration above each."""
    modules: dict[str, nn.Module] = {}
    configs: dict[str, Any] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in raw.split(".") if part != "_orig_mod")
        modules.setdefault(name, plain(module))
        parent = name.rpartition(".")[0]
        configs[name] = getattr(plain(module), "config", None) or configs.get(parent)
    return modules, configs


def _resolve(model: nn.Module, pattern: str) -> dict[str, Site]:
    """The sites that a pattern names, by the name that the caller will use for each."""
    require(isinstance(model, nn.Module), f"model: got {show(model)}, expected a torch.nn.Module")
    require(isinstance(pattern, str), f"sites: got {show(pattern)}, expected a string such as 'layer4:in'")
    modules, configs = _modules(model)
    cleaned = ".".join(part for part in pattern.split(".") if part != "_orig_mod")
    match = None if cleaned in modules else _SUFFIX.match(cleaned)
    name, side = (match["name"], match["side"]) if match else (cleaned, "out")
    head = int(match["head"]) if match and match["head"] else None
    ending = cleaned[len(name) :]
    if name in modules:
        names = [name]
    else:
        seen: set[int] = set()
        names = []
        for candidate, module in modules.items():
            if candidate and id(module) not in seen and fnmatch.fnmatchcase(candidate, name):
                seen.add(id(module))
                names.append(candidate)
    if side in PARTS:
        views = {each: head_view(modules[each], side, configs[each]) for each in names}
        if not any(views.values()) and names:
            known = [each for each in modules if head_view(modules[each], "z", configs[each])]
            nearest = (
                suggest(name, known) if known else "; this model has no attention blocks of a known layout"
            )
            raise InputError(f"sites: {pattern!r} has no attention heads{nearest}")
        found = {each: view for each, view in views.items() if view}
        for each, view in found.items():
            require(
                head is None or head < view.heads,
                f"sites: {pattern!r} asks for head {head}, but {each!r} has {view.heads} ({side}), counted from 0",
            )
        places = [
            Site(each + ending, view.module, view.side, replace(view, only=head))
            for each, view in found.items()
        ]
    else:
        require(head is None, f"sites: {pattern!r} has a head number, which belongs to :q, :k, :v or :z")
        places = [Site(each + ending, modules[each], side) for each in names]
    if not places:
        kind = type(plain(model)).__name__
        raise InputError(f"sites: {pattern!r} is no site of {kind}{suggest(name, [n for n in modules if n])}")
    return {place.name: place for place in places}
