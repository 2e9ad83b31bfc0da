"""Name places in a network; record, replace and differentiate what passes there.

A **site** is a module's name as ``named_modules()`` gives it, with ``:in`` or ``:out`` (the default) for the side:
``"layer4"``, ``"layer4:in"``; ``""`` is the model's own output and ``":in"`` its input. ``*``, ``?`` and ``[...]`` are
globs (``"h.*.mlp"``; ``*`` stops at a dot, ``**`` crosses it; ``"**"`` is everything). Attention blocks of known families have ``:q``, ``:k``, ``:v`` and
``:z``, (batch, position, head, size), single heads, ``"h.0.attn:z[3]"``, and with eager attention ``:pattern``, the probabilities (batch, head, query, key) (see :mod:`lineament.core.sites.heads`).

What is recorded is a copy made when it passes, so that no in-place operation further on (``nn.ReLU(inplace=True)``,
``out += identity``) changes it; a copy costs little beside the module that made the values. Inside the blocks
everything that ``torch.compile`` made runs eagerly, because compiled code does not look for new hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show, suggest
from lineament.core.models import device_of, frozen, plain_name, unwrapped
from lineament.core.sites import main_tensor
from lineament.core.sites.hooks import RECORD, Function, RootCall, attach, eagerly, replace, stop_if_all_agree
from lineament.core.sites.naming import Site, resolve


class Activations(Mapping[str, Tensor]):
    """What passed at each site during the last forward: a mapping from the site's name to its tensor.

    Sites that only ``**`` named are in it when it is walked where one tensor passed there: not those that never ran, hold no tensor or ran several times.
    """

    def __init__(
        self,
        places: Mapping[str, Site],
        gradients: bool,
        stop_early: bool,
        asked: Container[str] | None = None,
    ):
        self._asked = places if asked is None else asked
        self._places = dict(places)
        self._gradients = gradients
        self._stop_early = stop_early
        self._calls: dict[str, list[Tensor | str]] = {name: [] for name in places}
        self._missing = set(places)
        self._open = True
        self._running = False
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
        return (name for name in self._places if name in self._asked or self._passed(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

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
            found.append(main_tensor.unwrapped(value))
        if not found:
            place = self._places[key]
            raise InputError(
                f"site {site!r} was not reached: {type(place.module).__name__} did not run in the last forward "
                "(no forward yet, a branch not taken, or code that calls its parts and not the module)"
            )
        return found

    def reached(self) -> list[str]:
        """The sites that the last forward came by with a tensor; after a capture of ``"**"`` not all are."""
        return [
            name for name, calls in self._calls.items() if calls and all(isinstance(c, Tensor) for c in calls)
        ]

    def gradients(self, score: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """The gradient of a scalar with respect to what passed at each site: {site: d score / d activation}.

        A site on which the score does not depend has a gradient of zero. The graph stays, for other scores of the same forward.

        Args:
            score: a tensor with one element, computed from the model's output or from the captured tensors.
            create_graph: make the gradients differentiable themselves.

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
        tensors = {name: self[name] for name in self}
        # Of everything that passed, integers and what was computed without a graph have no gradient.
        tensors = {n: tensor for n, tensor in tensors.items() if n in self._asked or tensor.requires_grad}
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
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(tensors, found))

    def begin(self) -> None:
        """A forward of the model begins: what an earlier one left is forgotten."""
        self._started = self._running = True
        self._missing = set(self._places)
        for calls in self._calls.values():
            calls.clear()

    def end(self) -> None:
        """The forward is over."""
        self._running = False

    def satisfied(self) -> bool:
        """Whether the forward need not go on for the sake of this block."""
        return self._stop_early and not self._missing

    def _record(self, site: Site, value: Tensor | str) -> None:
        # What runs outside the model's own forward once that has run (a checkpointed segment in the backward
        # pass, say) is no part of it.
        if self._started and not self._running:
            return
        self._calls[site.name].append(value)
        self._missing.discard(site.name)
        if self._running and self.satisfied():
            stop_if_all_agree(self)

    def _passed(self, name: str) -> bool:
        calls = self._calls[name]
        return len(calls) == 1 and isinstance(calls[0], Tensor)

    def _key(self, site: str) -> str | None:
        """The name under which a site was asked for: ``"fc"`` and ``"fc:out"`` are the same place."""
        site = plain_name(site, self._places)
        other = site.removesuffix(":out") if site.endswith(":out") else f"{site}:out"
        return next((name for name in (site, other) if name in self._places), None)


class UnknownSite(InputError, KeyError):
    """A site that was not captured; also a ``KeyError``, so that the mapping behaves as one."""

    def __str__(self) -> str:
        return ValueError.__str__(self)


@contextmanager
def capture(
    model: nn.Module, sites: str | Iterable[str] = "**", *, gradients: bool = False, stop_early: bool = False
) -> Iterator[Activations]:
    """Record what passes at some sites while the block runs; every new forward of ``model`` starts afresh.

    A site whose module takes or returns a tuple, a dict or a dataclass gives its first tensor (``last_hidden_state``,
    ``logits``), and sequences of several lengths come padded with zeros to the longest. A module that runs twice has two :meth:`Activations.calls`. All hooks are removed at the end, also
    after an exception; what was recorded stays readable.

    Args:
        sites: a site or a glob, or several; by default everything: each tensor that passes at a module, and not what is no tensor or never runs.
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
    wanted = [sites] if isinstance(sites, str) else list(sites)
    places = resolve(model, wanted)
    named = [pattern for pattern in wanted if "**" not in pattern]
    acts = Activations(places, gradients, stop_early, resolve(model, named) if named else ())
    with ExitStack() as stack:
        stack.callback(setattr, acts, "_open", False)
        for place in places.values():
            attach(place, _recorder(acts, place), stack, RECORD, _without_tensor(acts, place))
        stack.enter_context(RootCall(unwrapped(model), acts))
        stack.enter_context(eagerly())
        yield acts


def record(model: nn.Module, inputs: Any, sites: str | Iterable[str]) -> dict[str, Tensor]:
    """What passes at some sites for these inputs: one forward without gradients, in eval mode, no further than needed.

    Args:
        inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; tensors are
            moved to the model's device.
        sites: a site or a glob, or several.

    Raises:
        InputError: an unknown site (names the nearest), or one that this forward does not reach.

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
    with ExitStack() as stack:
        for pattern, change in changes.items():
            require(
                callable(change) or isinstance(change, (Tensor, int, float)),
                f"site {pattern!r}: got {show(change)}, expected a tensor, a number or a function of a tensor",
            )
            functions = {
                place: partial(_fitted, place.name, change) for place in resolve(model, pattern).values()
            }
            stack.enter_context(replace(model, functions))
        yield


def _recorder(acts: Activations, site: Site) -> Function:
    """Records what passes; returns what to pass on where that is another tensor."""

    def see(tensor: Tensor) -> Tensor | None:
        if not acts._open:
            return None
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        kept = acts._gradients and differentiable and torch.is_grad_enabled()
        # The heads of a view are a copy already.
        copy = tensor if kept else tensor.detach()
        copy = copy if site.view is not None else copy.clone()
        if not kept:
            acts._record(site, copy)
            return None
        # A node of its own on the way (so that only this way counts), and another copy behind it: an in-place
        # operation then changes the copy, and never the recorded tensor or its place in the graph.
        if not copy.requires_grad and not main_tensor.transforming():
            copy.requires_grad_()
        acts._record(site, copy)
        return copy if site.view is not None else copy.clone()

    return see


def _without_tensor(acts: Activations, site: Site) -> Callable[[Any], None]:
    def see(value: Any) -> None:
        if acts._open:
            acts._record(site, f"{type(site.module).__name__} passed {show(value)}, which holds no tensor")

    return see


def _fitted(name: str, change: Any, old: Tensor) -> Tensor:
    """The new tensor in the shape, dtype and device of the old one, in memory of its own."""
    new = change(old.clone()) if callable(change) else change
    if isinstance(new, (int, float)):
        exact = old.is_floating_point() or old.is_complex()
        new = torch.tensor(new, device=old.device, dtype=old.dtype if exact else None)
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
    # The caller's tensor must survive in-place operations further on.
    return new.clone()
