"""How each operator of PyTorch passes labels on: products, sums, norms, convolutions, and everything that only moves elements.

The network runs once on one example under a dispatch mode, below its modules, so that functional code, views, residual sums and concatenations
are seen alike. Everything that only moves elements is run on the labels themselves. An operator without a rule holds what it touches in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lineament.core.models import called, frozen
from lineament.core.sites.hooks import eagerly
from lineament.core.surgery.labels import NONE, Atoms, Operand, varying

_MOVES = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "_reshape_copy",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "squeeze",
        "unsqueeze",
        "flip",
        "roll",
        "repeat",
        "narrow",
        "diagonal",
        "as_strided",
        "unfold",
        "im2col",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "index_select",
        "constant_pad_nd",
        "movedim",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "unsafe_chunk",
        "view_copy",
        "permute_copy",
        "expand_copy",
        "transpose_copy",
        "slice_copy",
        "repeat_interleave",
        "squeeze_copy",
        "unsqueeze_copy",
        "index",
        "triu",
        "tril",
    ]
)
_SAME = frozenset(
    [
        "clone",
        "detach",
        "alias",
        "_to_copy",
        "contiguous",
        "lift_fresh",
        "lift_fresh_copy",
        "positive",
        "_conj",
    ]
)
_POINTWISE = frozenset(
    ["hardswish", "_prelu_kernel", "rsub", "copy", "where", "masked_fill", "hardsigmoid", "mish", "threshold"]
)
_FACTORIES = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_empty_strided",
        "empty_strided",
        "fill",
        "zero",
        "uniform",
        "normal",
        "bernoulli",
    ]
)
_PRODUCTS = frozenset(["mul", "div", "addcmul", "addcdiv", "pow", "atan2", "true_divide"])
_SCANS = frozenset(["cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk"])
_REDUCTIONS = frozenset(
    [
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "norm",
        "linalg_vector_norm",
        "logsumexp",
        "prod",
        "argmax",
        "argmin",
        "any",
        "all",
        "median",
        "nanmean",
    ]
)
_POOLS = ("pool", "upsample", "reflection_pad", "replication_pad", "grid_sampler", "_upsample")
_BATCH_NORMS = ("batch_norm",)
_LAYER_NORMS = frozenset(["native_layer_norm", "_fused_rms_norm", "rms_norm"])
_SOFTMAXES = frozenset(["_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"])


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
        if not given or base in _FACTORIES:
            for t in given:
                self.put(t, [], False)
            return output
        if not labelled:
            if base in _MOVES or base in _SAME or "empty" in base:
                data = (bool(taken) and self.operand(taken[0]).data) or data
            for t in given:
                self.put(t, [], data)
            return output
        inplace = name != base and bool(args) and isinstance(args[0], Tensor)
        before = self.operand(args[0]).factors if inplace else []
        bound = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
        rule = self.rule(func, base)
        if rule is None:
            for t in taken:
                for f in self.operand(t).factors:
                    self.hold(f, sorted(varying(f)), f"the operator {base}")
            factors: list[list[Tensor]] = [[] for _ in given]
        else:
            factors = rule(func, base, bound, taken, given)
        for t, found in zip(given, factors):
            if inplace and t is args[0] and t._is_view() and found and not before:
                for f in found:  # what it is a view of does not know
                    self.hold(f, sorted(varying(f)), f"a write into a slice ({base})")
                found = []
            self.put(t, found, data)
        return output

    def rule(self, func: Any, base: str) -> Callable[..., list[list[Tensor]]] | None:
        if base in ("cat", "stack", "concat", "concatenate"):
            return self._joined
        if base == "convolution" or base.endswith("_convolution"):
            return self._convolution
        if base in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear"):
            return self._matrix
        if base in ("embedding", "gather", "index_put", "scatter"):
            return self._embedding if base == "embedding" else None
        if base in _MOVES:
            return self._moved
        if base in _SAME:
            return lambda func, base, bound, taken, given: [
                list(self.operand(taken[0]).factors) for _ in given
            ]
        if any(word in base for word in _BATCH_NORMS):
            return self._batch_norm
        if base in _LAYER_NORMS:
            return self._layer_norm
        if base == "native_group_norm":
            return self._group_norm
        if base == "_weight_norm_interface":
            return self._weight_norm
        if base in _SOFTMAXES or base in _SCANS:
            return self._along
        if base in _REDUCTIONS and "other" not in func._overloadname:
            return self._reduced
        if any(word in base for word in _POOLS):
            return self._pooled
        if torch.Tag.pointwise in func.tags or base in _POINTWISE:
            return self._elements
        return None

    def _elements(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        if base == "copy":
            taken = taken[1:]
        operands = [self.operand(t) for t in taken]
        if base in _PRODUCTS:  # of different channels, as in a gate; x f(x) is a function of x
            own = [f for o in operands if o.data for f in self.fresh(o).factors]
            if len({tuple(self.atoms.find(f).unique().tolist()) for f in own}) > 1:
                self.products += [(base, f.reshape(-1)) for f in own]
        found = self.pointwise(operands, given[0].ndim, base)
        if base in _PRODUCTS:
            self.scales += [f.reshape(-1) for o in operands if not o.data for f in o.factors]
        return [found for _ in given]

    def _moved(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        source = taken[0]
        operand = self.operand(source)
        chosen = [t for t in taken[1:] if self.operand(t).data]
        if chosen:
            axes = range(source.ndim)
            if base == "index_select":
                axes = [bound["dim"] % source.ndim]
            elif base == "index":
                axes = [axis for axis, t in enumerate(bound["indices"]) if t is not None]
            for f in operand.factors:
                self.hold(f, sorted(varying(f) & set(axes)), "a look-up by the inputs")
        moved: list[list[Tensor]] = [[] for _ in given]
        for f in self.fresh(operand).factors:
            labels = (f + 1).double().expand(source.shape).contiguous()  # padding, 0, becomes NONE

            def instead(leaf: Any, labels: Tensor = labels) -> Any:
                return labels if leaf is source else leaf

            if base == "as_strided":
                labels = labels.as_strided(source.shape, source.stride())
            arguments = tree_map(
                instead, {k: v for k, v in bound.items() if not (base == "constant_pad_nd" and k == "value")}
            )
            result = [t for t in tree_leaves(func(**arguments)) if isinstance(t, Tensor)]
            for place, t in enumerate(result):
                moved[place].append(t.round().long() - 1)
        return moved

    def _joined(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        dim, dims = bound.get("dim", 0) % given[0].ndim, given[0].ndim
        taken = [t for t in taken if t.shape != (0,)]
        parts = []
        for t in taken:
            operand = self.operand(t)
            if base == "stack":
                axes = [axis + (axis >= dim) for axis in range(t.ndim)]
                operand = self.fresh(operand).reshaped([1] * dims, axes)
            parts.append(self.fresh(operand))
        along = [[f for f in o.factors if dim in varying(f)] for o in parts]
        across = []
        for o, mine in zip(parts, along):
            shape = tuple(1 if axis == dim else size for axis, size in enumerate(o.shape))
            others = [f for f in o.factors if all(f is not m for m in mine)]
            across.append(Operand(shape, others, o.data, o.differs))
        found = self.pointwise(across, dims, base)
        if any(along):
            pieces = []
            for o, mine in zip(parts, along):
                size = o.shape[dim]
                if mine:
                    piece = self.pointwise([Operand(o.shape, mine, o.data)], dims, base)[:1] or mine[:1]
                    piece = piece[0].expand([size if a == dim else n for a, n in enumerate(piece[0].shape)])
                else:
                    fixed = o.data or (size > 1 and o.differs(dim))
                    label = int(self.atoms.new(1)) if fixed else NONE
                    if fixed:
                        self.stopped.append((f"{base} (with the inputs)", torch.tensor([label])))
                    piece = torch.full([size if a == dim else 1 for a in range(dims)], label)
                pieces.append(piece)
            wide = [max(p.shape[a] for p in pieces) for a in range(dims)]
            pieces = [p.expand([p.shape[a] if a == dim else wide[a] for a in range(dims)]) for p in pieces]
            found = [*found, torch.cat(pieces, dim)]
        return [found]

    def _matrix(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        bias = None
        if base == "linear":
            a, b = bound["input"], bound["weight"]
            bias = bound.get("bias")
            rows = [*range(a.ndim - 1)]
            space = [1] * (a.ndim + 1)
            left = self.operand(a).reshaped(space, [*rows, a.ndim - 1])
            right = self.operand(b).reshaped(space, [a.ndim, a.ndim - 1])
            found = self.product(left, right, space, a.ndim - 1, base)
            found = [f.squeeze(a.ndim - 1) for f in found]
        else:
            if base.startswith(("add", "badd")):
                bias, a, b = taken[:3]
            else:
                a, b = taken[:2]
            batch, matrix = int(a.ndim == 3), b.ndim > 1
            space = [1, 1, 1, 1]  # batch, rows, what is summed, columns
            left = self.operand(a).reshaped(space, [0, 1, 2][1 - batch :] if a.ndim > 1 else [2])
            right = self.operand(b).reshaped(space, ([0, 2, 3][1 - batch :]) if matrix else [2])
            found = self.product(left, right, space, 2, base)
            keep = ([0] if batch else []) + ([1] if a.ndim > 1 else []) + ([3] if matrix else [])
            found = [
                f.permute(*keep, *(x for x in range(4) if x not in keep)).reshape([f.shape[k] for k in keep])
                for f in found
            ]
        if isinstance(bias, Tensor):
            parts = [Operand(tuple(given[0].shape), found, True), self.operand(bias)]
            found = self.pointwise(parts, given[0].ndim, base)
        return [found]

    def _convolution(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        x, w = taken[:2]
        bias = bound.get("bias")
        groups, transposed, dims = bound["groups"], bound["transposed"], x.ndim
        inputs, weight = self.fresh(self.operand(x)), self.fresh(self.operand(w))
        for operand in (inputs, weight):
            for f in operand.factors:
                over = sorted(varying(f) & set(range(2, dims)))
                if over:
                    self.hold(f, over, "convolution")
        source = [f.amax(tuple(range(2, dims))) for f in self.fresh(inputs).factors if 1 in varying(f)]
        kernels = [f.amax(tuple(range(2, dims))) for f in self.fresh(weight).factors]
        if groups == 1:
            space = [1, 1, 1, 1]
            left = Operand(
                (1, 1, x.shape[1], 1), [f.view(1, 1, -1, 1) for f in (s[:1] for s in source)], inputs.data
            )
            axes = [2, 3] if transposed else [3, 2]
            right = Operand((w.shape[0], w.shape[1]), kernels, weight.data, weight.differs).reshaped(
                space, axes
            )
            found = [
                f.amax((0, 1, 2)).view(1, -1) for f in self.product(left, right, space, 2, "convolution")
            ]
        else:
            # Groups move as wholes: a group's channels keep their order, and its weights go with them.
            out_per, in_per = given[0].shape[1] // groups, x.shape[1] // groups
            shared, own = [], []
            for f in kernels:
                axis = next(iter(varying(f)))
                if axis == 0:
                    own.append(f.reshape(groups, -1).unsqueeze(2))
                else:
                    shared.append(f)
            for f in shared:
                self.hold(f, [1], "grouped convolution")
            taken_from = [s[:1].reshape(groups, 1, in_per) for s in source]
            for f in own if own and (transposed or out_per >= 1) else []:
                self.atoms.join_along(f, [1])
            for f in taken_from:
                self.atoms.join_along(f, [2])
            operands = [
                Operand((groups, 1, in_per), taken_from, inputs.data),
                Operand((groups, own[0].shape[1] if own else 1, 1), own, weight.data, weight.differs),
            ]
            found3 = self.pointwise(operands, 3, "grouped convolution")
            self.scales += [f.reshape(-1) for f in own]
            found = [
                f.amax(2)
                .expand(groups, f.shape[1])
                .repeat_interleave(out_per // f.shape[1], 1)
                .reshape(1, -1)
                for f in found3
            ]
        shape = (1,) * (dims - 2)
        found = [f.view(1, -1, *shape) for f in found]
        if isinstance(bias, Tensor):
            vector = self.fresh(self.operand(bias)).reshaped([1] * dims, [1])
            found = self.pointwise([Operand(tuple(given[0].shape), found, True), vector], dims, "convolution")
        return [found]

    def _embedding(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        found = []
        for f in self.fresh(self.operand(taken[0])).factors:
            if 0 in varying(f):
                self.hold(f, [0], "embedding (looked up by the inputs)")
            f = self.atoms.squeezed(f)
            if varying(f):
                self.calls.append(f.reshape(-1))
                self.looked_up.append(f.reshape(-1))
                found.append(f.reshape([1] * (given[0].ndim - 1) + [-1]))
        return [found]

    def _batch_norm(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        x, *vectors = taken
        own = [self.fresh(self.operand(v)).reshaped([1] * x.ndim, [1]) for v in vectors if v.ndim == 1]
        self.norms += [f.reshape(-1) for o in own for f in o.factors]
        found = self.pointwise([self.operand(x), *own], x.ndim, "batch_norm")
        return [found, *([] for _ in given[1:])]

    def _layer_norm(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        x, *vectors = taken
        dims = list(range(x.ndim - len(bound["normalized_shape"]), x.ndim))
        self._statistic(self.operand(x).factors, dims, base)
        found = self.pointwise([self.operand(x), *(self.operand(v) for v in vectors)], x.ndim, base)
        return [found, *([] for _ in given[1:])]

    def _group_norm(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        x, *vectors = taken
        groups = bound["group"]
        for f in self.fresh(self.operand(x)).factors:
            if 1 in varying(f):
                self.statistics.append((base, f.reshape(-1)))
                if groups > 1:
                    self.hold(f.reshape(f.shape[0], groups, -1, *f.shape[2:]), [2], base)
        own = [self.fresh(self.operand(v)).reshaped([1] * x.ndim, [1]) for v in vectors if v.ndim == 1]
        found = self.pointwise([self.operand(x), *own], x.ndim, base)
        return [found, *([] for _ in given[1:])]

    def _weight_norm(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        v, g = taken
        self._statistic(
            self.operand(v).factors, [a for a in range(v.ndim) if a != bound.get("dim", 0)], "weight norm"
        )
        return [self.pointwise([self.operand(v), self.operand(g)], v.ndim, base), *([] for _ in given[1:])]

    def _statistic(self, factors: Sequence[Tensor], dims: Sequence[int], operator: str) -> None:
        for f in factors:
            over = varying(f) & set(dims)
            if over:
                self.statistics.append((operator, f.reshape(-1)))
                if varying(f) - over:
                    self.hold(f, sorted(over), operator)

    def _along(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        dim = bound.get("dim", -1)
        dim = (dim if dim is not None else -1) % taken[0].ndim
        operand = self.fresh(self.operand(taken[0]))
        if base in _SCANS:
            for f in operand.factors:
                if dim in varying(f):
                    self.hold(f, [dim], base)
        else:
            self._statistic(operand.factors, [dim], base)
        found = self.fresh(operand).factors
        return [list(found) for _ in given]

    def _reduced(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        x = taken[0]
        dims = bound.get("dim")
        every = range(x.ndim)
        dims = (
            list(every)
            if dims is None or dims == []
            else [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        )
        operand = self.fresh(self.operand(x))
        self.calls += [f.reshape(-1) for f in operand.factors]
        self._statistic(operand.factors, dims, base)
        found = self.summed(self.fresh(operand).factors, dims, base)
        if given[0].ndim < x.ndim:
            keep = [d for d in every if d not in dims]
            found = [f.reshape([f.shape[k] for k in keep]) for f in found]
        return [list(found) for _ in given]

    def _pooled(self, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
        found = []
        spatial = list(range(2, taken[0].ndim)) if taken[0].ndim > 3 or "1d" in base else [taken[0].ndim - 1]
        if taken[0].ndim == 3 and "1d" not in base and "2d" in base:
            spatial = [1, 2]
        for f in self.fresh(self.operand(taken[0])).factors:
            over = sorted(varying(f) & set(spatial))
            if over:
                self.hold(f, over, base)
            f = self.atoms.squeezed(f)
            if varying(f):
                self.calls.append(f.reshape(-1))
                found.append(f)
        return [list(found) for _ in given]


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
