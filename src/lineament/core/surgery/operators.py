"""How each operator of PyTorch passes labels on: products, sums, norms, convolutions, and everything that only moves elements.

A rule gives the factors of what an operator returned. Everything that only moves elements is run on the labels themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lineament.core.surgery.labels import NONE, Operand, varying

if TYPE_CHECKING:
    from lineament.core.surgery.tracing import Trace

Rule = Callable[..., list[list[Tensor]]]

MOVES = frozenset(
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
SAME = frozenset(
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
FACTORIES = frozenset(
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


def rule(func: Any, base: str) -> Rule | None:
    """The rule of an operator, called with the trace, the operator, its name, its arguments, and the tensors that it took and gave."""
    if base in ("cat", "stack", "concat", "concatenate"):
        return _joined
    if base == "convolution" or base.endswith("_convolution"):
        return _convolution
    if base in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear"):
        return _matrix
    if base in ("embedding", "gather", "index_put", "scatter"):
        return _embedding if base == "embedding" else None
    if base in MOVES:
        return _moved
    if base in SAME:
        return _same
    if any(word in base for word in _BATCH_NORMS):
        return _batch_norm
    if base in _LAYER_NORMS:
        return _layer_norm
    if base == "native_group_norm":
        return _group_norm
    if base == "_weight_norm_interface":
        return _weight_norm
    if base in _SOFTMAXES or base in _SCANS:
        return _along
    if base in _REDUCTIONS and "other" not in func._overloadname:
        return _reduced
    if any(word in base for word in _POOLS):
        return _pooled
    if torch.Tag.pointwise in func.tags or base in _POINTWISE:
        return _elements
    return None


def _same(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    return [list(trace.operand(taken[0]).factors) for _ in given]


def _elements(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    if base == "copy":
        taken = taken[1:]
    operands = [trace.operand(t) for t in taken]
    if base in _PRODUCTS:  # of different channels, as in a gate; x f(x) is a function of x
        own = [f for o in operands if o.data for f in trace.fresh(o).factors]
        if len({tuple(trace.atoms.find(f).unique().tolist()) for f in own}) > 1:
            trace.products += [(base, f.reshape(-1)) for f in own]
    found = trace.pointwise(operands, given[0].ndim, base)
    if base in _PRODUCTS:
        trace.scales += [f.reshape(-1) for o in operands if not o.data for f in o.factors]
    return [found for _ in given]


def _moved(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    source = taken[0]
    operand = trace.operand(source)
    chosen = [t for t in taken[1:] if trace.operand(t).data]
    if chosen:
        axes = range(source.ndim)
        if base == "index_select":
            axes = [bound["dim"] % source.ndim]
        elif base == "index":
            axes = [axis for axis, t in enumerate(bound["indices"]) if t is not None]
        for f in operand.factors:
            trace.hold(f, sorted(varying(f) & set(axes)), "a look-up by the inputs")
    moved: list[list[Tensor]] = [[] for _ in given]
    for f in trace.fresh(operand).factors:
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


def _joined(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    dim, dims = bound.get("dim", 0) % given[0].ndim, given[0].ndim
    taken = [t for t in taken if t.shape != (0,)]
    parts = []
    for t in taken:
        operand = trace.operand(t)
        if base == "stack":
            axes = [axis + (axis >= dim) for axis in range(t.ndim)]
            operand = trace.fresh(operand).reshaped([1] * dims, axes)
        parts.append(trace.fresh(operand))
    along = [[f for f in o.factors if dim in varying(f)] for o in parts]
    across = []
    for o, mine in zip(parts, along):
        shape = tuple(1 if axis == dim else size for axis, size in enumerate(o.shape))
        others = [f for f in o.factors if all(f is not m for m in mine)]
        across.append(Operand(shape, others, o.data, o.differs))
    found = trace.pointwise(across, dims, base)
    if any(along):
        pieces = []
        for o, mine in zip(parts, along):
            size = o.shape[dim]
            if mine:
                piece = trace.pointwise([Operand(o.shape, mine, o.data)], dims, base)[:1] or mine[:1]
                piece = piece[0].expand([size if a == dim else n for a, n in enumerate(piece[0].shape)])
            else:
                fixed = o.data or (size > 1 and o.differs(dim))
                label = int(trace.atoms.new(1)) if fixed else NONE
                if fixed:
                    trace.stopped.append((f"{base} (with the inputs)", torch.tensor([label])))
                piece = torch.full([size if a == dim else 1 for a in range(dims)], label)
            pieces.append(piece)
        wide = [max(p.shape[a] for p in pieces) for a in range(dims)]
        pieces = [p.expand([p.shape[a] if a == dim else wide[a] for a in range(dims)]) for p in pieces]
        found = [*found, torch.cat(pieces, dim)]
    return [found]


def _matrix(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    bias = None
    if base == "linear":
        a, b = bound["input"], bound["weight"]
        bias = bound.get("bias")
        rows = [*range(a.ndim - 1)]
        space = [1] * (a.ndim + 1)
        left = trace.operand(a).reshaped(space, [*rows, a.ndim - 1])
        right = trace.operand(b).reshaped(space, [a.ndim, a.ndim - 1])
        found = trace.product(left, right, space, a.ndim - 1, base)
        found = [f.squeeze(a.ndim - 1) for f in found]
    else:
        if base.startswith(("add", "badd")):
            bias, a, b = taken[:3]
        else:
            a, b = taken[:2]
        batch, matrix = int(a.ndim == 3), b.ndim > 1
        space = [1, 1, 1, 1]  # batch, rows, what is summed, columns
        left = trace.operand(a).reshaped(space, [0, 1, 2][1 - batch :] if a.ndim > 1 else [2])
        right = trace.operand(b).reshaped(space, ([0, 2, 3][1 - batch :]) if matrix else [2])
        found = trace.product(left, right, space, 2, base)
        keep = ([0] if batch else []) + ([1] if a.ndim > 1 else []) + ([3] if matrix else [])
        found = [
            f.permute(*keep, *(x for x in range(4) if x not in keep)).reshape([f.shape[k] for k in keep])
            for f in found
        ]
    if isinstance(bias, Tensor):
        parts = [Operand(tuple(given[0].shape), found, True), trace.operand(bias)]
        found = trace.pointwise(parts, given[0].ndim, base)
    return [found]


def _convolution(
    trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any
) -> list[list[Tensor]]:
    x, w = taken[:2]
    bias = bound.get("bias")
    groups, transposed, dims = bound["groups"], bound["transposed"], x.ndim
    inputs, weight = trace.fresh(trace.operand(x)), trace.fresh(trace.operand(w))
    for operand in (inputs, weight):
        for f in operand.factors:
            over = sorted(varying(f) & set(range(2, dims)))
            if over:
                trace.hold(f, over, "convolution")
    source = [f.amax(tuple(range(2, dims))) for f in trace.fresh(inputs).factors if 1 in varying(f)]
    kernels = [f.amax(tuple(range(2, dims))) for f in trace.fresh(weight).factors]
    if groups == 1:
        space = [1, 1, 1, 1]
        left = Operand(
            (1, 1, x.shape[1], 1), [f.view(1, 1, -1, 1) for f in (s[:1] for s in source)], inputs.data
        )
        axes = [2, 3] if transposed else [3, 2]
        right = Operand((w.shape[0], w.shape[1]), kernels, weight.data, weight.differs).reshaped(space, axes)
        found = [f.amax((0, 1, 2)).view(1, -1) for f in trace.product(left, right, space, 2, "convolution")]
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
            trace.hold(f, [1], "grouped convolution")
        taken_from = [s[:1].reshape(groups, 1, in_per) for s in source]
        for f in own if own and (transposed or out_per >= 1) else []:
            trace.atoms.join_along(f, [1])
        for f in taken_from:
            trace.atoms.join_along(f, [2])
        operands = [
            Operand((groups, 1, in_per), taken_from, inputs.data),
            Operand((groups, own[0].shape[1] if own else 1, 1), own, weight.data, weight.differs),
        ]
        found3 = trace.pointwise(operands, 3, "grouped convolution")
        trace.scales += [f.reshape(-1) for f in own]
        found = [
            f.amax(2).expand(groups, f.shape[1]).repeat_interleave(out_per // f.shape[1], 1).reshape(1, -1)
            for f in found3
        ]
    shape = (1,) * (dims - 2)
    found = [f.view(1, -1, *shape) for f in found]
    if isinstance(bias, Tensor):
        vector = trace.fresh(trace.operand(bias)).reshaped([1] * dims, [1])
        found = trace.pointwise([Operand(tuple(given[0].shape), found, True), vector], dims, "convolution")
    return [found]


def _embedding(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    found = []
    for f in trace.fresh(trace.operand(taken[0])).factors:
        if 0 in varying(f):
            trace.hold(f, [0], "embedding (looked up by the inputs)")
        f = trace.atoms.squeezed(f)
        if varying(f):
            trace.calls.append(f.reshape(-1))
            trace.looked_up.append(f.reshape(-1))
            found.append(f.reshape([1] * (given[0].ndim - 1) + [-1]))
    return [found]


def _batch_norm(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    x, *vectors = taken
    own = [trace.fresh(trace.operand(v)).reshaped([1] * x.ndim, [1]) for v in vectors if v.ndim == 1]
    trace.norms += [f.reshape(-1) for o in own for f in o.factors]
    found = trace.pointwise([trace.operand(x), *own], x.ndim, "batch_norm")
    return [found, *([] for _ in given[1:])]


def _layer_norm(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    x, *vectors = taken
    dims = list(range(x.ndim - len(bound["normalized_shape"]), x.ndim))
    _statistic(trace, trace.operand(x).factors, dims, base)
    found = trace.pointwise([trace.operand(x), *(trace.operand(v) for v in vectors)], x.ndim, base)
    return [found, *([] for _ in given[1:])]


def _group_norm(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    x, *vectors = taken
    groups = bound["group"]
    for f in trace.fresh(trace.operand(x)).factors:
        if 1 in varying(f):
            trace.statistics.append((base, f.reshape(-1)))
            if groups > 1:
                trace.hold(f.reshape(f.shape[0], groups, -1, *f.shape[2:]), [2], base)
    own = [trace.fresh(trace.operand(v)).reshaped([1] * x.ndim, [1]) for v in vectors if v.ndim == 1]
    found = trace.pointwise([trace.operand(x), *own], x.ndim, base)
    return [found, *([] for _ in given[1:])]


def _weight_norm(
    trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any
) -> list[list[Tensor]]:
    v, g = taken
    _statistic(
        trace, trace.operand(v).factors, [a for a in range(v.ndim) if a != bound.get("dim", 0)], "weight norm"
    )
    return [trace.pointwise([trace.operand(v), trace.operand(g)], v.ndim, base), *([] for _ in given[1:])]


def _statistic(trace: Trace, factors: Sequence[Tensor], dims: Sequence[int], operator: str) -> None:
    for f in factors:
        over = varying(f) & set(dims)
        if over:
            trace.statistics.append((operator, f.reshape(-1)))
            if varying(f) - over:
                trace.hold(f, sorted(over), operator)


def _along(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    dim = bound.get("dim", -1)
    dim = (dim if dim is not None else -1) % taken[0].ndim
    operand = trace.fresh(trace.operand(taken[0]))
    if base in _SCANS:
        for f in operand.factors:
            if dim in varying(f):
                trace.hold(f, [dim], base)
    else:
        _statistic(trace, operand.factors, [dim], base)
    found = trace.fresh(operand).factors
    return [list(found) for _ in given]


def _reduced(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    x = taken[0]
    dims = bound.get("dim")
    every = range(x.ndim)
    dims = (
        list(every)
        if dims is None or dims == []
        else [d % x.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    )
    operand = trace.fresh(trace.operand(x))
    trace.calls += [f.reshape(-1) for f in operand.factors]
    _statistic(trace, operand.factors, dims, base)
    found = trace.summed(trace.fresh(operand).factors, dims, base)
    if given[0].ndim < x.ndim:
        keep = [d for d in every if d not in dims]
        found = [f.reshape([f.shape[k] for k in keep]) for f in found]
    return [list(found) for _ in given]


def _pooled(trace: Trace, func: Any, base: str, bound: Any, taken: Any, given: Any) -> list[list[Tensor]]:
    found = []
    spatial = list(range(2, taken[0].ndim)) if taken[0].ndim > 3 or "1d" in base else [taken[0].ndim - 1]
    if taken[0].ndim == 3 and "1d" not in base and "2d" in base:
        spatial = [1, 2]
    for f in trace.fresh(trace.operand(taken[0])).factors:
        over = sorted(varying(f) & set(spatial))
        if over:
            trace.hold(f, over, base)
        f = trace.atoms.squeezed(f)
        if varying(f):
            trace.calls.append(f.reshape(-1))
            found.append(f)
    return [list(found) for _ in given]
