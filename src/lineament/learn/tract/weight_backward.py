"""Give one layer's weight another way back, in place: the class of the layer is swapped, and nothing of the layer is written again.

Inside the forward of the swapped class the weight passes through an identity whose backward asks the owner for the gradient. What is computed
from the weight on the way (a parametrization, a cast under autocast) goes on as it was. A subclass's own forward may change its input or its
weight before it uses them, so there the identity sits in the call that multiplies the two. Measurements, which look at a model inside
:func:`~lineament.core.models.frozen`, see the ordinary way back.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lineament.core.checks import InputError
from lineament.core.models import looked_at


class Owner(Protocol):
    """Who decides what goes back to the weight."""

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor: ...
    def look_at(self, x: Any) -> None: ...
    def look_at_weight(self, weight: Tensor) -> None: ...


# A compiled graph holds no objects, so that it knows its owner by a number.
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(owner: Owner) -> int:
    """The number by which the layer's classes know their owner, from now until :func:`release`."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def release(layer: nn.Module, number: int) -> None:
    """Forget the owner, and what the layer holds for it; graphs that still know the number give the ordinary gradient."""
    vars(layer).pop("_weighed_input", None)
    _OWNERS.pop(number, None)


def is_swapped(layer: nn.Module) -> bool:
    """Whether the layer's weight has another way back already."""
    return hasattr(type(layer), "backward_owner")


def swapped_class(plain: Any, number: int, shape: torch.Size) -> type[nn.Module]:
    """The layer's class with a weight (of this shape) that, inside the forward, has another way back; its copies and pickles are plain layers."""
    parametrized: Any = getattr(plain, "weight", None)  # then the weight is a property that computes it
    stock = next(kind for kind in _USED_BY if issubclass(plain, kind))
    own = any(getattr(plain, m, None) is not getattr(stock, m, None) for m in ("forward", "_conv_forward"))

    def stored(self: Any) -> Tensor:
        if parametrized is not None:
            return parametrized.fget(self)
        # Pruning and the norms of torch.nn.utils set it before each forward, beside the parameters.
        return self._parameters["weight"] if "weight" in self._parameters else self.__dict__["weight"]

    def weight(self: Any) -> Tensor:
        x = self.__dict__.get("_weighed_input")
        if x is None or not torch.is_grad_enabled():
            return stored(self)
        return _Correction.apply(stored(self), x.detach(), number)  # pyright: ignore

    def set_weight(self: Any, value: Any) -> None:
        if parametrized is not None:
            parametrized.fset(self, value)
        elif "weight" in self._parameters:
            self._parameters["weight"] = value
        else:
            self.__dict__["weight"] = value

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not torch.compiler.is_compiling():
            # A curvature, a per-sample gradient, a saliency map: of the loss as it is.
            if looked_at(self):
                return plain.forward(self, *args, **kwargs)
            if (owner := _OWNERS.get(number)) is not None:
                owner.look_at(x)
        if own and torch.is_grad_enabled():
            calls = _Calls(self, plain, _USED_BY[stock], shape, number)
            with calls:
                made = plain.forward(self, *args, **kwargs)
            calls.check()
            return made
        self._weighed_input = x
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            self._weighed_input = None

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
        "weight": property(weight, set_weight),
        "forward": forward,
        "__deepcopy__": lambda self, memo: as_plain(self, lambda layer: copy.deepcopy(layer, memo)),
        "__reduce_ex__": reduce,
        "__module__": plain.__module__,
    }
    return type(f"Tract{plain.__name__}", (plain,), members)


# Where each kind of layer multiplies its weight with its input.
_USED_BY: dict[type, Any] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.Embedding: F.embedding,
}
_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class _Calls(TorchFunctionMode):
    """Inside a layer's own forward, gives the weight its other way back in the call that uses it."""

    def __init__(self, layer: Any, plain: Any, function: Any, shape: torch.Size, number: int):
        super().__init__()
        self.layer, self.plain, self.function, self.shape, self.number = layer, plain, function, shape, number
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {**dict(zip(("input", "weight", "bias", *_GEOMETRY), args)), **kwargs}
        if func is not self.function or named["weight"].shape != self.shape:
            return func(*args, **kwargs)
        if len(self.shape) > 2:
            self._check_geometry(named)
        if not torch.compiler.is_compiling() and (owner := _OWNERS.get(self.number)) is not None:
            owner.look_at_weight(named["weight"])
        self.found = True
        weight = _Correction.apply(named["weight"], named["input"].detach(), self.number)
        if len(args) > 1:
            return func(args[0], weight, *args[2:], **kwargs)
        return func(*args, **{**kwargs, "weight": weight})

    def _check_geometry(self, named: dict[str, Any]) -> None:
        """The patches are taken by the layer's attributes, so the call has to go by them too."""
        dims = len(self.shape) - 2
        for name, usual in _GEOMETRY.items():
            used, has = named.get(name, usual), getattr(self.layer, name)
            if isinstance(has, tuple) and not isinstance(used, str):
                used = (used,) * dims if isinstance(used, int) else tuple(used)
            if used != has:
                raise InputError(
                    f"layer: the forward of {self.plain.__name__} convolves with {name} {used!r} where the layer has {has!r}, so that tract "
                    "would take other patches; make the layer with what its forward uses, or choose another one"
                )

    def check(self) -> None:
        """Refuse a forward that multiplied the weight unseen."""
        if not self.found:
            raise InputError(
                f"layer: the forward of {self.plain.__name__} uses its weight otherwise than in F.{self.function.__name__}, so that tract cannot "
                "tell what the weight is multiplied with; choose another layer"
            )


class _Correction(torch.autograd.Function):
    """The identity on a weight, with another way back."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor, number: int) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, x, ctx.number = inputs
        # The layer keeps its input for its own weight gradient anyway.
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _corrected(gradient, x, ctx.number), None, None
        return _backward_of(gradient, x, ctx.number), None, None


def _backward_of(gradient: Tensor, x: Tensor, number: int) -> Tensor:
    owner = _OWNERS.get(number)
    return gradient if owner is None else owner.backward(gradient, x)


# For compiled graphs the whole correction is one operation: what it does is small and would only be compiled for nothing.
@torch.library.custom_op("lineament::tract_gradient", mutates_args=())
def _corrected(gradient: torch.Tensor, x: torch.Tensor, number: int) -> torch.Tensor:
    made = _backward_of(gradient, x, number)
    return made.clone() if made is gradient else made.contiguous()


@_corrected.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)
