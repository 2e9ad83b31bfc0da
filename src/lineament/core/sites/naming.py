"""What a site's name means: the module, the side of it, the attention head; and what the nearest names are.

A name is that of ``named_modules()`` (without the ``_orig_mod`` of compiled models), a glob over such names, and a
suffix: ``:in`` and ``:out`` for the sides, ``:q``, ``:k``, ``:v``, ``:z`` for the heads of an attention block, ``:z[3]`` for one, ``:pattern`` for
its probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lineament.core.checks import InputError, require, show, suggest
from lineament.core.models import plain_name, unwrapped
from lineament.core.sites.heads import PARTS, HeadView, head_view

_SUFFIX = re.compile(r"^(?P<name>.*):(?P<side>in|out|[qkvz]|pattern)(\[(?P<head>\d+)\])?$", re.DOTALL)


@dataclass(frozen=True)
class Site:
    """A place in a network: a module, a side of it (``"in"``, ``"out"`` or ``"pattern"``), and the head view where the site is one."""

    name: str
    module: nn.Module
    side: str = "out"
    view: HeadView | None = None

    @property
    def key(self) -> tuple[int, str]:
        """The identity of the tensor that passes here, whatever the site is called; heads of one projection share it."""
        return id(self.module), self.side

    @property
    def whole(self) -> Site:
        """The tensor that passes, with all its columns, where the site is a view of heads in it."""
        return replace(self, view=None)

    @property
    def input(self) -> Site:
        """What the module is given."""
        return replace(self, side="in", view=None)


def sites(model: nn.Module, pattern: str = "**") -> list[str]:
    """The names of the sites that a pattern matches, in the order of ``named_modules()``.

    Args:
        model: any module.
        pattern: a site or a glob, with its suffix (``"h.*.mlp:in"``, ``"**:z"``); ``*`` stops at a dot and ``**`` crosses it, so that ``"h.*"`` are the
            blocks and ``"**"`` is every module but the model itself. A module that has several names comes under the first.

    Raises:
        InputError: no site has this name or matches; the message names the nearest.

    >>> sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*:in")
    ['0:in', '1:in']
    """
    if pattern == "**" and isinstance(model, nn.Module) and not any(unwrapped(model).children()):
        return []
    return list(resolve(model, [pattern]))


def resolve(model: nn.Module, patterns: str | Iterable[str]) -> dict[str, Site]:
    """The sites that some patterns name, each by the name that the caller will use for it."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {show(model)}, expected a torch.nn.Module")
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    require(len(wanted) > 0, "sites: got none, expected at least one site or glob")
    modules: dict[str, nn.Module] = {}
    configs: dict[str, Any] = {}
    for name, module, config in _walk(unwrapped(model), "", None, ()):
        modules[name], configs[name] = module, config
    places: dict[str, Site] = {}
    for pattern in wanted:
        require(
            isinstance(pattern, str), f"sites: got {show(pattern)}, expected a string such as 'layer4:in'"
        )
        found = _resolve_one(pattern, modules, configs)
        if not found:
            kind = type(unwrapped(model)).__name__
            name = plain_name(pattern.rpartition(":")[0] or pattern)
            nearest = suggest(name, [name for name in modules if name])
            crossing = re.sub(r"(?<!\*)\*(?!\*)", "**", pattern)
            if crossing != pattern and _resolve_one(crossing, modules, configs):
                nearest = f"; * stops at a dot, {crossing!r} crosses it"
            raise InputError(f"sites: {pattern!r} is no site of {kind}{nearest}")
        for site in found:
            require(
                not isinstance(site.module, torch.jit.ScriptModule),
                f"sites: {site.name!r} is a TorchScript module, which cannot be watched; expected modules of plain PyTorch",
            )
            places[site.name] = site
    return places


def _walk(
    module: nn.Module, name: str, config: Any, above: tuple[int, ...]
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module by each of its names, with the configuration that holds for it.

    ``named_modules(remove_duplicate=False)`` would not end where a module holds one above it.
    """
    own = getattr(module, "config", None)
    config = config if own is None else own
    yield name, module, config
    for key, child in module._modules.items():
        child = unwrapped(child)
        if child is not None and id(child) not in above and child is not module:
            yield from _walk(child, f"{name}.{key}" if name else key, config, (*above, id(module)))


def _resolve_one(pattern: str, modules: dict[str, nn.Module], configs: dict[str, Any]) -> list[Site]:
    cleaned = plain_name(pattern, modules)
    match = None if cleaned in modules else _SUFFIX.match(cleaned)
    name, side = (match["name"], match["side"]) if match else (cleaned, "out")
    head = int(match["head"]) if match and match["head"] else None
    ending = cleaned[len(name) :]
    names = [name] if name in modules else _matching(name, modules)
    if side == "pattern" and head is None:
        blocks = [each for each in names if head_view(modules[each], "z", configs[each])]
        if blocks or not names:
            return [Site(each + ending, modules[each], side) for each in blocks]
    if side not in (*PARTS, "pattern"):
        require(head is None, f"sites: {pattern!r} has a head number, which belongs to :q, :k, :v or :z")
        return [Site(each + ending, modules[each], side) for each in names]
    require(
        side != "pattern" or head is None,
        f"sites: {pattern!r} has a head number; :pattern has all heads, (batch, head, query, key)",
    )
    views = {
        each: None if side == "pattern" else head_view(modules[each], side, configs[each]) for each in names
    }
    found = {each: view for each, view in views.items() if view is not None}
    if names and not found:
        known = [each for each in modules if head_view(modules[each], "z", configs[each])]
        nearest = suggest(name, known) if known else "; this model has no attention blocks of a known layout"
        raise InputError(f"sites: {pattern!r} has no attention heads{nearest}")
    for each, view in found.items():
        require(
            head is None or head < view.heads,
            f"sites: {pattern!r} asks for head {head}, but {each!r} has {view.heads} ({side}), counted from 0",
        )
    return [Site(each + ending, v.module, v.side, replace(v, only=head)) for each, v in found.items()]


def _matching(glob: str, modules: dict[str, nn.Module]) -> list[str]:
    """The names that match, one for each module; the model itself has to be asked for by its name, ``""``."""
    pattern, names = _pattern(glob), {}
    for name, module in modules.items():
        if name and pattern.fullmatch(name):
            names.setdefault(id(module), name)
    return list(names.values())


def matching(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob means, of modules or parameters: ``*`` stops at a dot and ``**`` crosses it, wherever the library takes globs.

    >>> matching("layer4.*", ["layer4.bias", "layer4.0.bias"]), matching("layer4.**", ["layer4.bias", "layer4.0.bias"])
    (['layer4.bias'], ['layer4.bias', 'layer4.0.bias'])
    """
    names = list(names)
    if glob in names:
        return [glob]
    pattern = _pattern(glob)
    return [name for name in names if pattern.fullmatch(name)]


def crossing(glob: str, names: Iterable[str]) -> str:
    """What to add to an error where a glob means nothing since its ``*`` stops at a dot, or ``""``.

    >>> crossing("layer4.*", ["layer4.0.bias"])
    "; '*' stops at a dot: 'layer4.**' would name 1"
    """
    wider = re.sub(r"\*+", "**", glob)
    found = matching(wider, names) if wider != glob else []
    return f"; '*' stops at a dot: {wider!r} would name {len(found)}" if found else ""


def _pattern(glob: str) -> re.Pattern[str]:
    """``*`` and ``?`` for anything within one part of a name, ``**`` for anything, ``[...]`` for a choice.

    >>> [bool(_pattern(glob).fullmatch("h.0.mlp")) for glob in ("h.*", "h.*.mlp", "h.**", "**.mlp", "h.[12].*")]
    [False, True, True, True, False]
    """
    found = []
    for token in re.findall(r"^\*\*\.|\*\*|\[!?[^]]+\]|.", glob, re.DOTALL):
        match token:
            case "**.":
                found.append(r"(?:.*\.)?")
            case "**":
                found.append(".*")
            case "*":
                found.append(r"[^.]*")
            case "?":
                found.append(r"[^.]")
            case _ if len(token) > 1:
                found.append(
                    "[" + re.escape(token[1:-1]).replace(r"\-", "-").replace("!", "^", token[1] == "!") + "]"
                )
            case _:
                found.append(re.escape(token))
    return re.compile("".join(found), re.DOTALL)
