"""Which parameters make, scale and read the same channels: labels of one forward, passed on by every operator.

The network runs once on one example under a dispatch mode, below its modules, so that functional code, views, residual sums and concatenations
are seen alike. An operator without a rule holds what it touches in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lineament.core.models import called, frozen
from lineament.core.sites.hooks import eagerly
from lineament.core.surgery.labels import Atoms, Operand, varying
from lineament.core.surgery.operators import FACTORIES, MOVES, SAME, rule


class Trace(TorchDispatchMode):
    """Labels of every tensor of one forward; ``atoms`` hold what was joined, and the lists below what happened to which atoms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.atoms = Atoms()
        self.tensors: dict[int, tuple[Tensor, Operand]] = {}
        self.axes: dict[tuple[str, int], tuple[int, int]] = {}  # (parameter, axis): its first atom, its size
        self.calls: list[Tensor] = []  # the atoms that each operator touched
        self.stopped: list[tuple[str, Tensor]] = []  # (operator, atoms held in place)
        self.statistics: list[tuple[str, Tensor]] = []
        self.products: list[tuple[str, Tensor]] = []
        self.heads: list[Tensor] = []
        self.read: list[Tensor] = []  # atoms of the weights' axes that read channels
        self.scales: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.looked_up: list[Tensor] = []
        # Buffers that no state dict holds are constants, such as rotary frequencies: they stay where they are.
        held = model.state_dict(keep_vars=True)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name not in held:
                continue
            factors = []
            for axis, size in enumerate(tensor.shape):
                if size > 1 and (tensor.is_floating_point() or isinstance(tensor, nn.Parameter)):
                    atoms = self.atoms.new(size)
                    self.axes[name, axis] = int(atoms[0]), size
                    factors.append(atoms.view([size if other == axis else 1 for other in range(tensor.ndim)]))
            self.tensors[id(tensor)] = tensor, Operand(tuple(tensor.shape), factors)

    # What is known of a tensor.

    def operand(self, tensor: Tensor) -> Operand:
        if id(tensor) in self.tensors:
            return self.tensors[id(tensor)][1]

        def differs(axis: int) -> bool:
            return tensor.shape[axis] > 1 and not bool((tensor == tensor.narrow(axis, 0, 1)).all())

        return Operand(tuple(tensor.shape), [], False, differs)

    def fresh(self, operand: Operand) -> Operand:
        """With the sets of now, and without factors that do not vary."""
        factors = [self.atoms.squeezed(f) for f in operand.factors]
        operand.factors = [f for f in factors if varying(f)]
        return operand

    def put(self, tensor: Tensor, factors: list[Tensor], data: bool) -> None:
        old = self.operand(tensor).differs
        differs = (lambda axis: True) if data or factors else old
        self.tensors[id(tensor)] = tensor, self.fresh(Operand(tuple(tensor.shape), factors, data, differs))

    def hold(self, labels: Tensor, axes: Sequence[int], operator: str) -> None:
        """Keep elements in their order along these axes."""
        self.atoms.join_along(labels, axes)
        known = labels[labels >= 0]
        if len(known) and not varying(self.atoms.squeezed(labels)):
            self.stopped.append((operator, known[:1].clone()))

    # The two rules from which the others are made.

    def pointwise(self, operands: Sequence[Operand], dims: int, operator: str) -> list[Tensor]:
        """The factors of elements that are combined one by one."""
        operands = [self.fresh(o.aligned(dims)) for o in operands]
        found: list[Tensor] = []
        for factor in (f for o in operands for f in o.factors):
            self.calls.append(factor.reshape(-1))
            overlapping = [g for g in found if varying(g) & varying(factor)]
            for other in overlapping:
                self.atoms.join(factor, other)
                a, b = torch.broadcast_tensors(other, factor)
                factor = torch.where(a >= 0, a, b)
            found = [g for g in found if all(g is not o for o in overlapping)]
            found.append(factor)
        for place, factor in enumerate(found):
            factor = self.atoms.squeezed(factor)
            held: set[int] = set()
            for o in operands:
                labelled: set[int] = set().union(*(varying(f) for f in o.factors))
                for axis in varying(factor) - labelled:
                    if o.shape[axis] > 1 and o.differs(axis):
                        held.add(axis)
            if held:
                inputs = any(o.data and not o.factors for o in operands)
                self.hold(factor, sorted(held), f"{operator} (with the inputs)" if inputs else operator)
            found[place] = self.atoms.squeezed(factor)
        return [f for f in found if varying(f)]

    def summed(self, factors: Sequence[Tensor], dims: Sequence[int], operator: str) -> list[Tensor]:
        """The factors (keeping the axes) of a sum over ``dims``: what varies only there is gone."""
        kept = []
        for factor in factors:
            factor = self.atoms.squeezed(factor)
            over = varying(factor) & set(dims)
            if over and varying(factor) <= set(dims):
                continue
            if over:
                self.hold(factor, sorted(over), operator)
            kept.append(self.atoms.squeezed(factor))
        return kept

    def product(self, a: Operand, b: Operand, space: Sequence[int], over: int, operator: str) -> list[Tensor]:
        """A product of two operands in a space of axes, summed over one of them."""
        for weight, other in ((a, b), (b, a)):
            if not weight.data and other.data:
                self.read += [f.reshape(-1) for f in self.fresh(weight).factors if over in varying(f)]
        joint = self.pointwise([a, b], len(space), operator)
        if a.data and b.data:
            self.heads += [f.reshape(-1) for f in joint if 0 in varying(f) and over != 0]
        return self.summed(joint, [over], operator)

    # The operators.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        data = any(self.operand(t).data for t in taken)
        labelled = any(self.fresh(self.operand(t)).factors for t in taken)
        name = func._schema.name.removeprefix("aten::")
        base = name if name.startswith("__") else name.rstrip("_")
        if not given or base in FACTORIES:
            for t in given:
                self.put(t, [], False)
            return output
        if not labelled:
            if base in MOVES or base in SAME or "empty" in base:
                data = (bool(taken) and self.operand(taken[0]).data) or data
            for t in given:
                self.put(t, [], data)
            return output
        inplace = name != base and bool(args) and isinstance(args[0], Tensor)
        before = self.operand(args[0]).factors if inplace else []
        bound = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
        found = rule(func, base)
        if found is None:
            for t in taken:
                for f in self.operand(t).factors:
                    self.hold(f, sorted(varying(f)), f"the operator {base}")
            factors: list[list[Tensor]] = [[] for _ in given]
        else:
            factors = found(self, func, base, bound, taken, given)
        for t, found in zip(given, factors):
            if inplace and t is args[0] and t._is_view() and found and not before:
                for f in found:  # what it is a view of does not know
                    self.hold(f, sorted(varying(f)), f"a write into a slice ({base})")
                found = []
            self.put(t, found, data)
        return output


class KeepsDouble(TorchDispatchMode):
    """Leaves float64 what a network would compute in single precision, as the norms of some language models do."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("dtype")
        double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(args))
        if double and isinstance(wanted, torch.dtype) and wanted.is_floating_point:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def traced(model: nn.Module, example: Any) -> tuple[Trace, Any]:
    """The labels of one forward on an example, and what it gave; every label that reaches the outputs is held in place."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        trace = Trace(model)
        for leaf in tree_leaves(example):
            if isinstance(leaf, Tensor):
                trace.put(leaf, [], True)
        stack.enter_context(torch.no_grad())
        stack.enter_context(eagerly())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        with trace:
            output = called(model, example)
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            for f in trace.fresh(trace.operand(leaf)).factors:
                trace.hold(f, sorted(varying(f)), "the outputs")
    return trace, output
