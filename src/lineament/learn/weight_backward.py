"""Give one layer's weight another way back, in place: the class of the layer is swapped, and nothing of the layer is written again.

Inside the forward of the swapped class the weight passes through an identity whose backward asks the owner for the gradient. What is computed
from the weight on the way (a subclass's own forward, a parametrization, a cast under autocast) goes on as it was. Measurements, which look at a
model inside :func:`~lineament.core.models.frozen`, see the ordinary way back.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lineament.core.models import looked_at


class Owner(Protocol):
    """Who decides what goes back to the weight."""

    def backward(self, gradient: Tensor, x: Tensor) -> Tensor: ...
    def look_at(self, x: Any) -> None: ...


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


def swapped_class(plain: Any, number: int) -> type[nn.Module]:
    """The layer's class with a weight that, inside the forward, has another way back; its copies and pickles are plain layers."""
    parametrized: Any = getattr(plain, "weight", None)  # then the weight is a property that computes it

    def stored(self: Any) -> Tensor:
        return self._parameters["weight"] if parametrized is None else parametrized.fget(self)

    def weight(self: Any) -> Tensor:
        x = self.__dict__.get("_weighed_input")
        if x is None or not torch.is_grad_enabled():
            return stored(self)
        return _Correction.apply(stored(self), x.detach(), number)  # pyright: ignore

    def set_weight(self: Any, value: Any) -> None:
        if parametrized is None:
            self._parameters["weight"] = value
        else:
            parametrized.fset(self, value)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not torch.compiler.is_compiling():
            # A curvature, a per-sample gradient, a saliency map: of the loss as it is.
            if looked_at(self):
                return plain.forward(self, *args, **kwargs)
            if (owner := _OWNERS.get(number)) is not None:
                owner.look_at(x)
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
