"""Make a network with other channels: chosen ones, reordered ones, sums or means of them, by one operation on whole groups.

Every parameter that makes a group's channels is multiplied by one matrix, every parameter that reads them by another. The result is a plain module
of the same class with smaller parameters; the network that was passed stays as it was. What was done is noted in the result, so that
:func:`lineament.core.surgery.saving.load` can repeat it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lineament.core.checks import InputError, require, show
from lineament.core.models import called, frozen
from lineament.core.surgery.groups import ChannelGroup, Entry, plain_network

RECORD = "surgery"  # the attribute of an operated network that says what was done

# How attention modules and configurations count heads, and the widths that follow from it.
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERIES = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "split_size",
    "all_head_size",
    "inner_dim",
)
_SHARING = ("num_key_value_groups", "n_rep")  # query heads for each key
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "mlp_dim")

Matrices = tuple[Float[Tensor, "new old"], Float[Tensor, "old new"]]


def rewrite(
    model: nn.Module,
    changes: Mapping[ChannelGroup, Matrices],
    *,
    example: Any = None,
    through_norms: bool = False,
) -> nn.Module:
    """The network whose groups hold other channels: what makes them is multiplied by ``write``, what reads them by ``read``.

    Rows of ones choose (``remove``) or reorder (``permute``); sums and means merge. With ``write = diag(1, 1, 1)`` and its transpose nothing changes.

    Args:
        model: the network that the groups are of; it stays as it was.
        changes: {group of :func:`channel_groups`: (write (new x old), read (old x new))}.
        example: inputs on which the new network has to run.
        through_norms: mix the vectors of batch norms in the same way, which is wrong for their variances.

    Returns:
        A network of the same class, really narrower, called in the same way.

    Raises:
        InputError: matrices of other sizes; a tied weight that would be written and read differently; a mixture of channels behind a batch norm.

    >>> from lineament.core.surgery import channel_groups
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> group = channel_groups(net, torch.ones(1, 2))["0"]
    >>> write = torch.eye(3)[[0, 2]]
    >>> rewrite(net, {group: (write, write.T)})
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    model = plain_network(model)
    for group, (write, read) in changes.items():
        _check(group, write, read, through_norms)
    _check_query_heads(changes)
    new = copy.deepcopy(model)
    tensors = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    by_axis: dict[tuple[str, int], list[tuple[Entry, Tensor]]] = {}
    for group, (write, read) in changes.items():
        for e in group.entries:
            require(
                e.parameter in tensors,
                f"groups: {group.name!r} names {e.parameter!r}, which the model has not; trace this model's own groups",
            )
            by_axis.setdefault((e.parameter, e.axis), []).append((e, read.T if e.role == "read" else write))
    with torch.no_grad():
        for (parameter, axis), parts in by_axis.items():
            old = tensors[parameter]
            tensors[parameter] = _multiplied(old, axis, parts)
    steps = [_step(group, len(write)) for group, (write, _) in changes.items() if len(write) != group.size]
    _install(new, {parameter: tensors[parameter] for parameter, _ in by_axis}, steps)
    # One step: the slots of groups that share an axis are those from before any of them went.
    made = [{"kind": "narrow", "groups": steps}] if steps else []
    setattr(new, RECORD, [*getattr(model, RECORD, []), *made])
    if example is not None:
        runs(new, example)
    return new


def remove(
    model: nn.Module, channels: Mapping[ChannelGroup, Sequence[int]], *, example: Any = None
) -> nn.Module:
    """The network without some channels of its groups.

    Args:
        model: the network; it stays as it was.
        channels: {group: indices to take out}.
        example: inputs on which the new network has to run.

    Raises:
        InputError: an index that a group has not, or a group that would be empty.

    >>> from lineament.core.surgery import channel_groups
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> remove(net, {channel_groups(net, torch.ones(1, 2))["0"]: [1]})[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    changes: dict[ChannelGroup, Matrices] = {}
    for group, gone in channels.items():
        out = {int(i) for i in gone}
        require(
            all(0 <= i < group.size for i in out),
            f"channels: {group.name!r} has channels 0 to {group.size - 1}, got {sorted(out)[-1] if out else None}",
        )
        require(
            len(out) < group.size,
            f"channels: all {group.size} of {group.name!r} would be taken out; keep at least one",
        )
        write = torch.eye(group.size, dtype=torch.float64)[[i for i in range(group.size) if i not in out]]
        changes[group] = write, write.T
    return rewrite(model, changes, example=example)


def unbending(
    model: nn.Module, groups: Mapping[str, ChannelGroup], together: Iterable[Sequence[str]], *, example: Any
) -> list[str]:
    """The names of the groups without one channel of which the network does not run on ``example``; those of ``together`` narrow at once.

    >>> from lineament.core.surgery import channel_groups
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> unbending(net, channel_groups(net, torch.ones(1, 2)), [["0"]], example=torch.ones(1, 2))
    []
    """

    def bends(names: Sequence[str]) -> bool:
        try:
            remove(model, {groups[name]: [0] for name in names}, example=example)
        except InputError:
            return False
        return True

    return [] if bends(list(groups)) else [name for names in together if not bends(names) for name in names]


def permute(model: nn.Module, orders: Mapping[ChannelGroup, Sequence[int] | Tensor]) -> nn.Module:
    """The same function with its channels in another order: channel ``i`` of the result is channel ``order[i]`` of the model.

    Raises:
        InputError: an order that is no permutation of the group.

    >>> from lineament.core.surgery import channel_groups
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    >>> x = torch.ones(1, 2, dtype=torch.float64)
    >>> other = permute(net, {channel_groups(net, x)["0"]: [2, 0, 1]})
    >>> torch.equal(other[0].weight[0], net[0].weight[2]), torch.allclose(other(x), net(x))
    (True, True)
    """
    changes: dict[ChannelGroup, Matrices] = {}
    for group, order in orders.items():
        order = torch.as_tensor(order)
        require(
            order.shape == (group.size,) and torch.equal(order.sort().values.cpu(), torch.arange(group.size)),
            f"orders: {show(order)} is no permutation of the {group.size} channels of {group.name!r}",
        )
        write = torch.eye(group.size, dtype=torch.float64)[order.cpu()]
        changes[group] = write, write.T
    return rewrite(model, changes)


def chooses(matrix: Tensor) -> bool:
    """Whether each row takes one channel as it is."""
    return bool(((matrix == 0) | (matrix == 1)).all() and (matrix.sum(1) == 1).all())


def runs(model: nn.Module, example: Any) -> Any:
    """What an operated network answers to an example.

    Raises:
        InputError: it does not run: a module computes with a width of its own.
    """
    try:
        with frozen(model), torch.no_grad():
            return called(model, example)
    except (RuntimeError, IndexError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise InputError(
            f"groups: the narrower network does not run ({said}): one of its modules computes with a number of channels that is written in its code; leave "
            "its groups out"
        ) from error


def _check(group: ChannelGroup, write: Tensor, read: Tensor, through_norms: bool) -> None:
    require(
        isinstance(group, ChannelGroup),
        f"changes: keys are groups, as channel_groups(model, example) gives them, got {show(group)}",
    )
    n = group.size
    require(
        write.ndim == read.ndim == 2
        and write.shape[1] == n
        and read.shape == (n, len(write))
        and len(write) > 0,
        f"changes: {group.name!r} has {n} channels, so write is (new x {n}) and read ({n} x new), got {tuple(write.shape)} and {tuple(read.shape)}",
    )
    require(
        bool(write.isfinite().all() and read.isfinite().all()),
        f"changes: the matrices of {group.name!r} are not finite",
    )
    mixes = not chooses(write)
    tied = group.having("both")
    require(
        not tied or torch.equal(write, read.T),
        f"changes: {tied[0].parameter if tied else ''!r} both makes and reads the channels of {group.name!r}, so write and read must be each other's transpose",
    )
    norms = group.having("norm")
    require(
        not norms or not mixes or through_norms,
        f"changes: channels of {group.name!r} pass a batch norm ({norms[0].parameter if norms else ''}), whose statistics a mixture does not keep; fold it first",
    )
    require(
        len(write) <= n,
        f"changes: {group.name!r} has {n} channels and would have {len(write)}; they can only become fewer",
    )


def _check_query_heads(changes: Mapping[ChannelGroup, Matrices]) -> None:
    """Attention has one number of query heads for all keys, and a group is not changed together with what is within it."""
    named = {group.name for group in changes}
    left: dict[str, list[int]] = {}
    for group, (write, _) in changes.items():
        if group.keys:
            left.setdefault(group.name.rpartition("[")[0], []).append(len(write))
    for group, (write, _) in changes.items():
        if not group.keys:
            continue
        block = group.name.rpartition("[")[0]
        require(
            block not in named,
            f"changes: {group.name!r} are heads within {block!r}, which is changed too; change one after the other",
        )
        require(
            len(write) == group.size or (len(left[block]) == group.keys and len(set(left[block])) == 1),
            f"changes: {group.name!r} would have {len(write)} of {group.size} query heads, expected the same number for each of the {group.keys} keys of its block",
        )


def _multiplied(tensor: Tensor, axis: int, parts: Sequence[tuple[Entry, Tensor]]) -> Tensor:
    """New channels in the places of the first old ones; the other places go."""
    moved = tensor.detach().movedim(axis, 0)
    result, gone = moved.clone(), torch.zeros(len(moved), dtype=torch.bool)
    for entry, matrix in parts:
        slots = entry.slots.to(moved.device)
        old = moved[slots.reshape(-1)].reshape(len(slots), -1)
        if chooses(matrix):
            new = old[matrix.argmax(1).to(old.device)]
        else:
            new = (matrix.to(old.device, torch.float64) @ old.double()).to(old.dtype)
        count = len(matrix)
        result[slots[:count].reshape(-1)] = new.reshape(-1, *moved.shape[1:])
        gone[entry.slots[count:].reshape(-1)] = True
    return result[~gone.to(result.device)].movedim(0, axis).contiguous()


def _step(group: ChannelGroup, size: int) -> dict[str, Any]:
    entries = [{"parameter": e.parameter, "axis": e.axis, "slots": e.slots.tolist()} for e in group.entries]
    return {
        "group": group.name,
        "size": size,
        "of": group.size,
        "heads": group.heads,
        "keys": group.keys,
        "entries": entries,
    }


def _install(model: nn.Module, tensors: Mapping[str, Tensor], steps: Sequence[Mapping[str, Any]]) -> None:
    """Put tensors in every place of the old ones, and bring the modules' numbers in line with them."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    instead: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        old = named[name]
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        instead[id(old)] = tensor
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is not None and id(old) in instead:
                    table[key] = instead[id(old)]  # pyright: ignore[reportArgumentType]
    new = {id(tensor) for tensor in instead.values()}
    for module in model.modules():  # also those whose weight is computed from parameters of their own
        if any(id(t) in new for t in (*module.parameters(), *module.buffers())):
            _renumber(module)
    counted: set[int] = set()
    for step in steps:
        _recount(model, step, counted if step.get("keys") else set())
    _reconfigure(model, steps)


def _renumber(module: nn.Module) -> None:
    weight: Any = getattr(module, "weight", None)
    layer: Any = module
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        made, taken = weight.shape[:2] if not transposed else weight.shape[1::-1]
        if module.groups > 1:
            old = module.in_channels if transposed else module.out_channels
            layer.groups = module.groups * weight.shape[0] // old
        layer.out_channels = made * (layer.groups if transposed else 1)
        layer.in_channels = taken * (1 if transposed else layer.groups)
    elif isinstance(module, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(module, _NormBase):
        vector = weight if weight is not None else module.running_mean
        layer.num_features = module.num_features if vector is None else len(vector)
    elif isinstance(module, nn.GroupNorm):
        layer.num_groups = module.num_groups * len(weight) // module.num_channels
        layer.num_channels = len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        layer.num_parameters = len(weight)
    elif isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None and len(module.in_proj_weight) != 3 * module.embed_dim:
            raise InputError(
                "groups: nn.MultiheadAttention computes the size of its heads from the width of the stream, so it cannot have fewer; leave its heads whole"
            )
    elif hasattr(module, "nf") and isinstance(weight, Tensor):  # GPT-2's convolution of size one
        layer.nf = weight.shape[1]
        if hasattr(module, "nx"):
            layer.nx = weight.shape[0]


def _recount(model: nn.Module, step: Mapping[str, Any], seen: set[int]) -> None:
    """Attention modules count their heads, and split by widths that follow from it; those in ``seen`` have been counted."""
    if not step["heads"]:
        return
    names = (*_QUERIES, *(_SHARING if step.get("keys") else _KEYS))
    for e in step["entries"]:
        parts = e["parameter"].split(".")
        for depth in (
            len(parts) - 1,
            len(parts) - 2,
        ):  # the module that holds the parameter, and the one around it
            module: Any = model.get_submodule(".".join(parts[: max(depth, 0)]))
            if id(module) in seen or isinstance(module, (nn.Linear, _ConvNd)) or module is model:
                continue
            seen.add(id(module))
            for name in names:
                value = getattr(module, name, None)
                if isinstance(value, int) and value * step["size"] % step["of"] == 0:
                    setattr(module, name, value * step["size"] // step["of"])


def _reconfigure(model: nn.Module, steps: Sequence[Mapping[str, Any]]) -> None:
    """The configuration of a Hugging Face model, where every layer has the same number."""
    config: Any = getattr(model, "config", None)
    if config is None or not steps:
        return
    layers = getattr(config, "num_hidden_layers", None)
    for shared in (False, True):
        blocks = {
            s["group"].rpartition("[")[0] if shared else s["group"]: (s["size"], s["of"])
            for s in steps
            if s["heads"] and bool(s.get("keys")) == shared
        }
        if len(set(blocks.values())) != 1 or len(blocks) != layers:
            continue
        (size, of) = next(iter(blocks.values()))
        heads = config.num_attention_heads
        if getattr(config, "head_dim", None) is None and hasattr(config, "hidden_size"):
            config.head_dim = config.hidden_size // heads
        for name in ("num_attention_heads", "n_head", *(() if shared else ("num_key_value_heads",))):
            value = getattr(config, name, None)
            if isinstance(value, int) and (name != "n_head" or config.n_head == heads):
                setattr(config, name, value * size // of)
    narrow = [s for s in steps if not s["heads"]]
    for name in _WIDTHS:
        value = getattr(config, name, None)
        if (
            value is None and name == "n_inner" and hasattr(config, name)
        ):  # GPT-2's word for four times the width
            value = 4 * config.hidden_size
        there = [s for s in narrow if s["of"] == value]
        if value is not None and len(there) == layers and len({s["size"] for s in there}) == 1:
            setattr(config, name, there[0]["size"])
