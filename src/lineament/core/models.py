"""What every method needs of a model: its logits, its device, and to find it afterwards as it was before.

Models are plain ``nn.Module``s. Hugging Face models answer with a dataclass or a dict; :func:`logits` takes the
scores out of it, so that no method has to know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core.checks import InputError, show

# What torch says where a tensor's form does not fit a layer.
_MISFIT = re.compile(
    r"shape|size|channel|dimension|dtype|should be the same|same device|must match|scalar type"
)


def logits(output: Any) -> Tensor:
    """The scores in a model's output: the tensor itself, or the ``logits`` of a dataclass or dict.

    A tuple gives its only tensor. Anything else raises :class:`InputError` that names what came.

    >>> logits({"loss": None, "logits": torch.ones(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits")
        if isinstance(found, Tensor):
            return found
        raise InputError(
            f"the model returned a dict with keys {list(output)}, expected a tensor or a 'logits' entry; "
            "say which it is (`output`), or wrap the model so that it returns its logits"
        )
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1 and isinstance(output[0], Tensor):
        return output[0]
    raise InputError(
        f"the model returned {show(output)} ({type(output).__name__}), expected a tensor of logits; "
        "say which output that is (`output`), or wrap the model so that it returns its logits"
    )


def decided(scores: Tensor, dim: int = -1) -> Tensor:
    """The class of each sample: the largest score's; of a single logit, 1 where it is positive.

    >>> decided(torch.tensor([[0.2, 0.7]])).tolist(), decided(torch.tensor([[-1.0], [2.0]])).tolist()
    ([1], [0, 1])
    """
    return scores.argmax(dim) if scores.shape[dim] > 1 else (scores.squeeze(dim) > 0).long()


def class_logits(scores: Tensor) -> Tensor:
    """(batch, classes) with a column for each class: a single logit z of two classes becomes (0, z).

    >>> class_logits(torch.tensor([[-1.0], [2.0]])).tolist()
    [[0.0, -1.0], [0.0, 2.0]]
    """
    return torch.cat([torch.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's answer to inputs as loaders give them: a tensor, a tuple of arguments, or a dict of keyword arguments.

    >>> called(nn.Bilinear(2, 2, 1), (torch.ones(3, 2), torch.ones(3, 2))).shape
    torch.Size([3, 1])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def opened(weight: Tensor) -> Tensor:
    """The real numbers of a weight that is held as integers by a tensor class of its own (as torchao's are); others as they are.

    >>> opened(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    own = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if own else weight  # pyright: ignore[reportReturnType]


def quantised_layer(model: nn.Module) -> str | None:
    """The first layer whose weights are held as integers: by PyTorch's quantised modules, bitsandbytes, or a tensor class of its own.

    >>> quantised_layer(nn.Linear(2, 2)) is None
    True
    """
    for name, module in model.named_modules():
        kind = type(module).__module__
        held = module.parameters(recurse=False)
        if (
            ".quantized" in kind
            or "bitsandbytes" in kind
            or any(type(p).dequantize is not Tensor.dequantize for p in held)
        ):
            return f"{name or 'itself'} ({type(module).__name__})"
    return None


def rows_in(inputs: Any) -> int:
    """How many samples a batch holds: the rows of its first tensor.

    >>> rows_in({"ids": torch.ones(3, 2), "mask": torch.ones(3, 2)})
    3
    """
    if isinstance(inputs, Mapping):
        inputs = next(iter(inputs.values()))
    return rows_in(inputs[0]) if isinstance(inputs, (tuple, list)) else len(inputs)


def moved(value: Any, device: torch.device) -> Any:
    """Every tensor in a tensor, mapping, tuple or list on a device.

    >>> moved({"ids": torch.ones(2)}, torch.device("meta"))["ids"].device
    device(type='meta')
    """
    return _each(value, lambda tensor: tensor.to(device))


def ordinary(value: Any) -> Any:
    """Every tensor in a tensor, mapping, tuple or list as one that may enter a graph: those made under inference mode are cloned, as leaves.

    >>> with torch.inference_mode():
    ...     made = torch.ones(2)
    >>> made.is_inference(), ordinary([made])[0].is_inference()
    (True, False)
    """
    with torch.inference_mode(False):
        return _each(
            value, lambda t: t.detach().clone().requires_grad_(t.requires_grad) if t.is_inference() else t
        )


def made_trainable(tensors: Iterable[Tensor]) -> None:
    """Make parameters and buffers of inference mode ordinary ones, in place: whoever holds them, a model or an optimizer, can train them then.

    >>> with torch.inference_mode():
    ...     net = nn.Linear(1, 1)
    >>> weight = net.weight
    >>> made_trainable(net.parameters())
    >>> weight is net.weight, weight.is_inference()
    (True, False)
    """
    with torch.inference_mode(False):
        for tensor in tensors:
            if tensor.is_inference():
                other = ordinary(tensor)
                other = (
                    nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
                )
                torch.utils.swap_tensors(tensor, other)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_each(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def widened(value: Any) -> Any:
    """Every tensor of half precision in a tensor, mapping, tuple or list, in float32.

    >>> widened([torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.long)])
    [tensor([1.]), tensor([1])]
    """
    return _each(value, lambda tensor: tensor.float() if is_half(tensor.dtype) else tensor)


def answered(model: Callable[..., Any], inputs: Tensor, what: str = "images") -> Tensor:
    """``logits(model(inputs))``; inputs that do not fit the model are named by their shape.

    Raises:
        InputError: the forward failed over a shape or a dtype; or as :func:`logits`.

    >>> answered(nn.Linear(2, 1), torch.zeros(1, 3), "inputs")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: model: Linear does not take inputs of shape (3,) in float32 (mat1 and mat2 shapes cannot be multiplied \
(1x3 and 2x1)); bring them to the size, channels and dtype that it was made for
    """
    try:
        output = model(inputs)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[:1]
        if not said or not _MISFIT.search(said[0]) or "out of memory" in said[0]:
            raise
        name = type(model).__name__ if isinstance(model, nn.Module) else show(model)
        dtype = str(inputs.dtype).removeprefix("torch.")
        raise InputError(
            f"model: {name} does not take {what} of shape {tuple(inputs.shape[1:])} in {dtype} ({said[0]}); bring them to the size, channels and "
            "dtype that it was made for"
        ) from error
    return logits(output)


def unwrapped(model: Any) -> Any:
    """The module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, or the model itself.

    >>> net = nn.Linear(1, 1)
    >>> unwrapped(nn.DataParallel(torch.compile(net))) is net
    True
    """
    # Asking a module for an attribute that it lacks takes microseconds, many times over in walks through whole models.
    while (parts := getattr(model, "_modules", None)) is not None:
        if "_orig_mod" in parts:
            model = parts["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = parts["module"]
        else:
            break
    return model


def plain_name(name: str, known: Container[str] = ()) -> str:
    """The name of a module or parameter without what wrappers put into it.

    >>> plain_name("module._orig_mod.layer.weight", {"layer.weight"}), plain_name("module.0", {"module.0"})
    ('layer.weight', 'module.0')
    """
    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    inner = name.removeprefix("module.")
    return inner if name not in known and inner in known else name


def takes_hooks(module: nn.Module) -> bool:
    """Whether a module can be watched; those of TorchScript cannot."""
    return not isinstance(module, torch.jit.RecursiveScriptModule)  # pyright: ignore[reportPrivateImportUsage]


def weight_of(module: nn.Module) -> Tensor:
    """A layer's weight as its forward uses it: a parameter, or computed (weight norm, spectral norm, pruning masks, parametrizations).

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    >>> weight_of(layer).shape
    torch.Size([3, 2])
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"model: {type(module).__name__} has no weight")
    return weight


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer, or where Accelerate brings it to be computed with; the CPU for a model without any."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_meta:
            places = (getattr(h, "execution_device", None) for m in model.modules() for h in _offloading(m))
            place = next((place for place in places if place is not None), None)
            if place is not None:
                return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        return tensor.device
    return torch.device("cpu")


@contextmanager
def usable(device: str | torch.device) -> Iterator[None]:
    """What is brought to a device inside says in one line if that cannot be used here.

    >>> with usable("cpu"):
    ...     _ = nn.Linear(1, 1).to("cpu")
    """
    try:
        torch.zeros(1, device=device)
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: {str(device)!r} cannot be used here ({reason})") from error


def held_weights(model: nn.Module, *, by_name: bool = False) -> Iterator[tuple[str, Any]]:
    """What ``model.state_dict()`` holds, one by one, perhaps in the order of their names, each as :func:`held_weight` gives it.

    >>> [name for name, _ in held_weights(nn.Linear(1, 1), by_name=True)]
    ['bias', 'weight']
    """
    state = model.state_dict()
    for name in sorted(state) if by_name else state:
        value = state[name]
        yield name, held_weight(model, name, value) if isinstance(value, Tensor) else value


def held_weight(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A weight of this name; one that Accelerate keeps on the CPU or on a disk, and that is empty in the model, as it lies there; of quantised ones the real numbers.

    >>> held_weight(nn.Linear(1, 1), "bias", torch.ones(1))
    tensor([1.])
    """
    if value.is_meta:
        modules, parts = dict(model.named_modules()), name.split(".")
        # The hook that has it may be that of a module around its own.
        for cut in reversed(range(len(parts))):
            around = modules.get(".".join(parts[:cut]))
            for hook in _offloading(around) if around is not None else ():
                with suppress(KeyError):
                    return opened(hook.weights_map[".".join(parts[cut:])])
    return opened(value)


def offloaded(model: nn.Module) -> bool:
    """Whether weights lie elsewhere until a module computes (:func:`held_weights`), so that neither they nor gradients for them can be had here.

    >>> offloaded(nn.Linear(1, 1)), offloaded(nn.Linear(1, 1, device="meta"))
    (False, True)
    """
    return any(p.is_meta for p in model.parameters())


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of Accelerate by which a module has its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    return [
        each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "weights_map", None) is not None
    ]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter or buffer; torch's default for a model without any."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype holds real numbers with less than single precision.

    >>> is_half(torch.bfloat16), is_half(torch.float32), is_half(torch.int8)
    (True, False, False)
    """
    return dtype.is_floating_point and dtype.itemsize < 4


@contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which other tensors, by name, stand in every place of a parameter or buffer.

    As ``torch.func.functional_call`` has it for one call, but for modules that have several names: that puts the first name's tensor
    back, and then the replacement for good.

    >>> half = nn.Linear(1, 1, bias=False)
    >>> net, weight = nn.Sequential(half, half), half.weight
    >>> with holding(net, {"0.weight": torch.full((1, 1), 3.0)}):
    ...     net(torch.ones(1, 1)).item()
    9.0
    >>> half.weight is weight
    True
    """
    known = chain(model.named_parameters(), model.named_buffers())
    instead = {id(old): tensors[name] for name, old in known if name in tensors}
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    places = [(table, key, old) for table in tables for key, old in table.items() if id(old) in instead]
    try:
        for table, key, old in places:
            table[key] = instead[id(old)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for table, key, old in places:
            table[key] = old  # pyright: ignore[reportArgumentType]


# How many blocks of :func:`frozen` are around each module, by its id.
_LOOKED_AT: dict[int, int] = {}


def looked_at(module: nn.Module) -> bool:
    """Whether a :func:`frozen` block is around the module: what asks for gradients there measures, and trains nothing.

    For modules whose training goes by other gradients than those of the loss.

    >>> net = nn.Linear(1, 1)
    >>> with frozen(net):
    ...     looked_at(net), looked_at(nn.Linear(1, 1))
    (True, False)
    >>> looked_at(net)
    False
    """
    return id(module) in _LOOKED_AT


def masks_to_nan(model: nn.Module) -> bool:
    """Whether a row of attention in which everything is masked comes out as NaN, so that padding must not come before the text.

    Eager attention of transformers' Llama and its kin takes the softmax in float32, where the lowest number of float64 is -inf; GPT-2's does not.
    """
    config: Any = getattr(model, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return eager and getattr(config, "model_type", None) != "gpt2" and dtype_of(model) == torch.float64


@contextmanager
def frozen(
    model: nn.Module, *, training: bool = False, requires_grad: bool | None = False
) -> Iterator[nn.Module]:
    """The model in eval mode with its parameters not asking for gradients, and as it was afterwards.

    Every module's mode, every parameter's ``requires_grad`` and every buffer (:func:`buffers_kept`) is put back, also after an exception.
    Weights made under inference mode, which can be in no graph, are replaced by clones meanwhile.
    ``training=True`` puts it in train mode instead; ``requires_grad=None`` leaves those flags alone.

    >>> net = nn.Dropout()
    >>> with frozen(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    # By the modules' own tables: naming every tensor takes several times as long.
    tables = (table.values() for module in model.modules() for table in (module._parameters, module._buffers))
    with ExitStack() as stack:
        if any(t is not None and t.is_inference() for t in chain.from_iterable(tables)):
            named = (*model.named_parameters(), *model.named_buffers())
            inference = {name: ordinary(tensor) for name, tensor in named if tensor.is_inference()}
            stack.enter_context(holding(model, inference))
        stack.enter_context(_modes_kept(model, training, requires_grad))
        # In the mode of the block, in which most batch norms write nothing.
        stack.enter_context(buffers_kept(model))
        yield model


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """A block after which every buffer is the tensor, with the values, that it was: what forwards write there is gone.

    But for the statistics of batch norms in eval mode, which no forward changes, and masks.

    >>> net = nn.InstanceNorm1d(1, track_running_stats=True)
    >>> with buffers_kept(net):
    ...     _ = net(torch.ones(2, 1, 3))
    >>> net.running_mean.item()
    0.0
    """
    held = [(table, key, tensor, tensor.detach().clone()) for table, key, tensor in written_buffers(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for table, key, tensor, copy in held:
                table[key] = tensor
                # Batch norm's own writes are not counted in its tensors' versions.
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def written_buffers(model: nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
    """The buffers that a forward in the present modes may change, as (table, key, tensor).

    >>> len(written_buffers(nn.BatchNorm1d(1))), len(written_buffers(nn.BatchNorm1d(1).eval()))
    (3, 0)
    """
    return [
        (module._buffers, key, tensor)
        for module in model.modules()
        if not isinstance(module, _BatchNorm) or module.training
        for key, tensor in module._buffers.items()
        if tensor is not None and tensor.dtype != torch.bool and not tensor.is_meta
    ]


@contextmanager
def _modes_kept(model: nn.Module, training: bool, requires_grad: bool | None) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module, _ in modes:
        _LOOKED_AT[id(module)] = _LOOKED_AT.get(id(module), 0) + 1
    try:
        model.train(training)
        if requires_grad is not None:
            for parameter, _ in flags:
                parameter.requires_grad_(requires_grad)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
            _LOOKED_AT[id(module)] -= 1
            if not _LOOKED_AT[id(module)]:
                del _LOOKED_AT[id(module)]
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
