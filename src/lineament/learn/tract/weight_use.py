"""Give one layer's weight another way back, in place: the class of the layer is swapped, and nothing of the layer is written again.

Inside the forward of the swapped class, the call that multiplies the weight with its input (``F.conv2d``, ...) gets the weight through an
identity whose backward asks the owner for the gradient. A hook on the weight would not do: it cannot tell of which of several forwards a
gradient comes, nor what a parametrization or a forward of the layer's own has made of weight and input. Measurements, which look at a
model inside :func:`~lineament.core.models.frozen`, see the ordinary way back.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lineament.core.checks import require
from lineament.core.models import looked_at
from lineament.learn.tract.rows import Use

# Where each kind of layer multiplies its weight with its input.
USED_BY: dict[type[nn.Module], Any] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.Embedding: F.embedding,
}


class Owner(Protocol):
    """Who decides what goes back to the weight."""

    def backward(self, gradient: Tensor, x: Tensor, use: Use) -> Tensor: ...
    def look_at(self, x: Any) -> None: ...
    def look_at_weight(self, weight: Tensor) -> None: ...


# A compiled graph holds no objects, so it knows its owner by a number.
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(owner: Owner) -> int:
    """The number by which the layer's class knows its owner, from now until :func:`release`."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def release(number: int) -> None:
    """Forget the owner; graphs that still know the number give the ordinary gradient."""
    _OWNERS.pop(number, None)


def is_swapped(layer: nn.Module) -> bool:
    """Whether the layer's weight has another way back already."""
    return hasattr(type(layer), "backward_owner")


def swapped_class(plain: Any, number: int, shape: torch.Size) -> Any:
    """The layer's class with another way back for its weight (of this shape); its copies and pickles are plain layers."""
    function = next(function for kind, function in USED_BY.items() if issubclass(plain, kind))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            # A curvature, a per-sample gradient, a saliency map: of the loss as it is.
            if looked_at(self):
                return plain.forward(self, *args, **kwargs)
            if (owner := _OWNERS.get(number)) is not None:
                owner.look_at(args[0] if args else next(iter(kwargs.values()), None))
        if not torch.is_grad_enabled():
            return plain.forward(self, *args, **kwargs)
        calls = _Calls(function, shape, number)
        with calls:
            made = plain.forward(self, *args, **kwargs)
        require(
            calls.found,
            f"layer: the forward of {plain.__name__} uses its weight otherwise than in F.{function.__name__}, so tract cannot tell "
            "what the weight is multiplied with; choose another layer",
        )
        return made

    def as_plain(self: Any, make: Any) -> Any:
        swapped = type(self)
        self.__class__ = plain
        try:
            return make(self)
        finally:
            self.__class__ = swapped

    def reduce(self: Any, protocol: int) -> Any:
        make, args, *rest = as_plain(self, lambda layer: layer.__reduce_ex__(protocol))
        # pickle wants __newobj__ to make an object of the class at hand, which is the swapped one.
        return functools.partial(make, *args), (), *rest

    members = {
        # The layer keeps its owner alive, for whoever called tract(model) and kept nothing.
        "backward_owner": _OWNERS[number],
        "forward": forward,
        "__deepcopy__": lambda self, memo: as_plain(self, lambda layer: copy.deepcopy(layer, memo)),
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
    }
    return type(f"Tract{plain.__name__}", (plain,), members)


class _Calls(TorchFunctionMode):
    """Inside a layer's forward, gives the weight its other way back in the call that uses it."""

    def __init__(self, function: Any, shape: torch.Size, number: int):
        super().__init__()
        self.function, self.shape, self.number = function, shape, number
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        named = {**dict(zip(names, args)), **kwargs}
        if func is not self.function or named["weight"].shape != self.shape:
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling() and (owner := _OWNERS.get(self.number)) is not None:
            owner.look_at_weight(named["weight"])
        self.found = True
        use = _use_of(self.shape, named)
        weight = _Correction.apply(
            named["weight"], named["input"].detach(), self.number, use.stride, use.sides, use.dilation, use.groups
        )  # fmt: skip
        if len(args) > 1:
            return func(args[0], weight, *args[2:], **kwargs)
        return func(*args, **{**kwargs, "weight": weight})


def _use_of(shape: torch.Size, named: dict[str, Any]) -> Use:
    """What a call of a convolution multiplies its weight with, by the call's own arguments."""
    dims = len(shape) - 2
    if not dims:
        return Use(shape)

    def each(name: str, usual: int) -> tuple[int, ...]:
        value = named.get(name, usual)
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))

    dilation = each("dilation", 1)
    if named.get("padding") == "same":
        totals = [step * (size - 1) for size, step in zip(shape[2:], dilation)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in ((0,) * dims if named.get("padding") == "valid" else each("padding", 0))]
    sides = tuple(side for pair in reversed(pairs) for side in pair)
    return Use(shape, each("stride", 1), sides, dilation, named.get("groups", 1))


class _Correction(torch.autograd.Function):
    """The identity on a weight, with another way back."""

    @staticmethod
    def forward(
        weight: Tensor, x: Tensor, number: int, stride: Any, sides: Any, dilation: Any, groups: int
    ) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, ctx.number, *ctx.use = inputs
        # The layer keeps its input for its own weight gradient anyway.
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        make = _corrected if torch.compiler.is_compiling() else _backward_of
        return make(gradient, x, ctx.number, *ctx.use), *(None,) * 6


def _backward_of(
    gradient: Tensor, x: Tensor, number: int, stride: Any, sides: Any, dilation: Any, groups: int
) -> Tensor:
    owner = _OWNERS.get(number)
    use = Use(gradient.shape, stride, sides, dilation, groups)
    return gradient if owner is None else owner.backward(gradient, x, use)


# For compiled graphs the whole correction is one operation: what it does is small and would only be compiled for nothing.
@torch.library.custom_op("lineament::tract_gradient", mutates_args=())
def _corrected(
    gradient: torch.Tensor,
    x: torch.Tensor,
    number: int,
    stride: Sequence[int],
    sides: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    made = _backward_of(gradient, x, number, stride, sides, dilation, groups)
    return made.clone() if made is gradient else made.contiguous()


@_corrected.register_fake
def _(gradient: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)
