"""What may be explained besides images: signals, rows, and one of the several tensors that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lineament.core import checks

F = TypeVar("F", bound=Callable[..., Any])
# Arguments that may hold something for each sample.
_BY_SAMPLE = ("targets", "maps", "methods", "baseline")
# Whether what looks like images one pixel high are signals or rows.
of_signals: ContextVar[bool] = ContextVar("of_signals", default=False)


def takes_all(function: F) -> F:
    """Let a function ``(model, images, ...)`` take what else a network takes, with the same results.

    Signals (batch, channels, steps) and rows (batch, features) are images one pixel high inside, and so are the maps that are given; maps that
    are returned are (batch, 1, steps). Of a tuple or dict of tensors the first with real numbers is explained; the others are given to
    the model as they are, so that samples run one at a time.
    """

    @wraps(function)
    def call(model: Any, images: Any, *args: Any, **options: Any) -> Any:
        if isinstance(images, (tuple, list, Mapping)):
            return _one_at_a_time(call, model, images, args, options)
        kinds = isinstance(images, Tensor) and images.ndim in (2, 3) and images.is_floating_point()
        # A network of two-dimensional convolutions takes images, whatever it is given.
        if not kinds or not isinstance(model, nn.Module) or any(isinstance(m, nn.Conv2d) for m in model.modules()):  # fmt: skip
            return function(model, images, *args, **options)
        return _as_images(function, model, images, args, options)

    return call  # pyright: ignore[reportReturnType]


def _as_images(function: Any, model: nn.Module, images: Tensor, args: Any, options: Any) -> Any:
    rows = images.ndim == 2

    def raised(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value[:, None] if value.ndim == 2 else value
            return value[:, :, None] if value.ndim == 3 else value
        if isinstance(value, Mapping):
            return {key: raised(member) for key, member in value.items()}
        if callable(value) and not isinstance(value, type):
            return lambda x: raised(value(lowered(x)))
        return value

    def lowered(x: Tensor) -> Tensor:
        return x[:, 0, 0] if rows else x[:, :, 0]

    def before(_: nn.Module, given: tuple[Any, ...]) -> Any:
        first, *others = given
        return (lowered(first), *others) if isinstance(first, Tensor) and first.ndim == 4 else None

    # Before the other tensors of a sample join what is explained.
    handle = model.register_forward_pre_hook(before, prepend=True)
    token = of_signals.set(True)
    try:
        first = [raised(value) if isinstance(value, (Tensor, Mapping)) else value for value in args]
        maps = {k: raised(v) if k in ("maps", "methods", "baseline") else v for k, v in options.items()}
        return _flat(function(model, raised(images), *first, **maps))
    finally:
        of_signals.reset(token)
        handle.remove()


def _flat(found: Any) -> Any:
    """Maps one pixel high without their height; other results as they are."""
    if isinstance(found, Tensor) and found.ndim == 4 and found.shape[2] == 1:
        return found[:, :, 0]
    return {key: _flat(member) for key, member in found.items()} if isinstance(found, dict) else found


def _one_at_a_time(call: Callable[..., Any], model: Any, inputs: Any, args: Any, options: Any) -> Any:
    named = isinstance(inputs, Mapping)
    every: dict[Any, Any] = dict(inputs) if named else dict(enumerate(inputs))
    main = next((key for key, x in every.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1), None)  # fmt: skip
    checks.require(
        main is not None,
        f"images: got {checks.show(inputs)}, of which none is a batch of real numbers; token ids are explained by lineament.explain.token_gradients and its kin",
    )
    count = len(every[main])
    uneven = [str(key) for key, x in every.items() if isinstance(x, Tensor) and x.ndim and len(x) != count]
    checks.require(not uneven, f"images: {', '.join(uneven)} and {main} hold different numbers of samples")
    found = []
    for at in range(count):

        def part(value: Any, at: int = at) -> Any:
            if isinstance(value, Mapping):
                return {key: part(member) for key, member in value.items()}
            listed = isinstance(value, (Tensor, list)) and not (isinstance(value, Tensor) and not value.ndim)
            return value[at : at + 1] if listed and len(value) == count else value

        own = {key: part(x) for key, x in every.items()}

        def with_others(
            _: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], own: dict[Any, Any] = own
        ) -> Any:
            if len(given) != 1 or keywords:
                return None
            x = given[0]
            whole = {
                k: v.to(x.device).expand(len(x), *v.shape[1:]) if isinstance(v, Tensor) and v.ndim else v
                for k, v in own.items()
            }
            whole[main] = x
            return ((), whole) if named else (tuple(whole.values()), {})

        handle = model.register_forward_pre_hook(with_others, with_kwargs=True)
        try:
            settings = {k: part(v) if k in _BY_SAMPLE else v for k, v in options.items()}
            found.append(call(model, own[main], *(part(value) for value in args), **settings))
        finally:
            handle.remove()
    return _together(found)


def _together(found: list[Any]) -> Any:
    """The results of single samples as one: what has a row for each sample is joined."""
    first = found[0]
    if isinstance(first, Tensor):
        return torch.cat(found) if first.ndim and len(first) == 1 else first
    if isinstance(first, dict):
        return {key: _together([each[key] for each in found]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return replace(
            first, **{f.name: _together([getattr(each, f.name) for each in found]) for f in fields(first)}
        )
    return first
