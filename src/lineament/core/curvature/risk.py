"""The empirical risk of a model over a loader, chunk by chunk, as a function of leaves that are not the model's own.

R(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i). The leaves share the parameters' memory, so that nothing is copied, and nothing is
written to the model: neither gradients nor running statistics nor modes. Weights, buffers and data of half precision are copied to float32,
which holds four bytes a weight as long as the risk lives: what a second derivative is made of does not survive bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core import checks
from lineament.core.curvature.fast.graph import FastGraph
from lineament.core.loaders import batches_of
from lineament.core.models import (
    called,
    frozen,
    holding,
    is_half,
    logits,
    moved,
    opened,
    ordinary,
    plain_name,
    quantised_layer,
    rows_in,
    unwrapped,
    widened,
)
from lineament.core.sites.naming import crossing, matching

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A part of the data, on the model's device; ``count`` samples, behind ``start`` others."""

    index: int
    start: int
    inputs: Any
    targets: Any
    count: int


class Risk:
    """The mean loss over a loader, whose graphs can be differentiated twice."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        loader: Iterable[Any],
        *,
        params: str | Sequence[str] | None = None,
        batchnorm: str = "eval",
        chunk: int | None = None,
    ):
        checks.require(
            isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
        )
        checks.require(callable(loss_fn), f"loss_fn: got {checks.show(loss_fn)}, expected a function")
        # A compiled model cannot be differentiated twice; the module it was made of can.
        self.model: nn.Module = unwrapped(model)
        self.loss_fn, self.loader = loss_fn, batches_of(loader)
        self.batchnorm = checks.one_of("batchnorm", batchnorm, ("eval", "train"))
        self.chunk = None if chunk is None else checks.number("chunk", chunk, low=1, integer=True)
        checks.require(
            chunk is None or batchnorm == "eval",
            "chunk: batch norm in train mode takes its statistics from whole batches, which cannot be split; "
            "give smaller batches, or batchnorm='eval'",
        )
        self.names = chosen_parameters(self.model, params)
        self._sources: dict[str, Tensor] = {}
        # A sample by which the others are weighed: outputs, target and the gradient of its own loss.
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None
        # Whether graphs are made of PyTorch's own operations only.
        self.plain = False
        self.refresh()
        empty = next(iter(self._batches()), None) is None
        checks.require(not empty, "loader: it is empty; expected at least one (inputs, targets) batch")

    def refresh(self) -> tuple[Any, ...]:
        """Take the weights as they are now; the value changes exactly when any weight or buffer did."""
        parameters = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        # PyTorch counts no changes that are made through ``.data``: the sums tell.
        wide = {n: torch.float32 if is_half(p.dtype) else None for n, p in parameters.items()}
        sums = [p.detach().sum(dtype=wide[n]) for n, p in parameters.items()]
        # Tensors of inference mode count no changes.
        tensors = (*parameters.values(), *buffers.values())
        counts = [(_address(t), 0 if t.is_inference() else t._version) for t in tensors]
        state = (*counts, *(each.item() for each in sums))
        if not self._sources or state != self._state:
            bad = [n for (n, p), each in zip(parameters.items(), sums) if not _finite(p, each)]
            checks.require(not bad, f"model: the weights hold NaN or infinite values, first in {bad[:1]}")
            self._sources = {n: widened(ordinary(p).detach()) for n, p in parameters.items()}
            self.leaves = {n: self._sources[n].detach().requires_grad_() for n in self.names}
            self._state = state
        return state

    def chunks(self) -> Iterator[Chunk]:
        """The data, in the loader's order, in parts of at most ``chunk`` samples."""
        index = seen = 0
        for inputs, targets in self._batches():
            total = rows_in(inputs)
            step = self.chunk or total
            for start in range(0, total, step):
                part = slice(start, start + step)
                whole = step >= total
                x, y = (inputs, targets) if whole else (_sliced(inputs, part), _sliced(targets, part))
                yield Chunk(index, seen, x, y, rows_in(x))
                index, seen = index + 1, seen + rows_in(x)
        checks.require(index > 0, "loader: it is empty; expected at least one (inputs, targets) batch")

    def outputs(self, chunk: Chunk, leaves: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model's logits on a chunk, at other leaves where given; call inside :meth:`ready`."""
        # What a forward writes into its buffers goes into these copies, never into the model.
        buffers = {name: widened(b.clone()) for name, b in self.model.named_buffers()}
        with holding(self.model, {**self._sources, **(leaves or self.leaves), **buffers}):
            return logits(called(self.model, chunk.inputs))

    def reached(self, outputs: Tensor) -> Tensor:
        """``outputs``, if gradients pass from them to the leaves.

        Raises:
            NoGradientError: they do not.
        """
        if not outputs.requires_grad:
            raise checks.NoGradientError(
                f"model: gradients cannot pass from its output to {self.names[0]!r}, or to any other of the {len(self.names)} parameters asked "
                "for: the output does not depend on them, or the model detaches or rounds it on the way; choose other params, or the "
                "network as it was trained"
            )
        return outputs

    def weight(self, chunk: Chunk, outputs: Tensor) -> float:
        """What the loss divides by on a chunk, up to a factor that all chunks share: its samples, or their class weights, or those not ignored.

        It is the sum over the mean for losses that can give both, else measured by how much a sample joined to the chunk counts in the mean.
        """
        z = torch.linspace(0.1, 0.9, max(outputs.numel(), 1), dtype=outputs.dtype, device=outputs.device)
        z = z[: outputs.numel()].reshape(outputs.shape)
        y = chunk.targets
        with torch.no_grad():
            total = _summed(self.loss_fn, z, y)
            if total is not None:
                mean = float(self.loss_fn(z, y))
                found = total / mean if math.isfinite(mean) and mean else (0.0 if math.isnan(mean) else None)
                return float(chunk.count) if found is None else _whole(found)
        with torch.enable_grad():
            return _whole(self._measured(z, y, chunk.count))

    def _measured(self, z: Tensor, y: Any, count: int) -> float:
        if not isinstance(y, Tensor) or z.ndim == 0 or len(y) != len(z):
            return float(count)
        try:
            for row in range(len(z)) if self._joined is None else ():
                alone = self._slope(z[row : row + 1], y[row : row + 1])
                if bool(torch.isfinite(alone).all()) and bool(alone.any()):
                    self._joined = z[row : row + 1], y[row : row + 1], alone[0]
                    break
            if self._joined is None:
                # No sample has a loss of its own: all are ignored, or it is no loss of single samples.
                return 0.0 if bool(self.loss_fn(z, y).isnan().all()) else float(count)
            if self._joined[0].shape[1:] != z.shape[1:]:
                return float(count)
            one, label, alone = self._joined
            share = self._slope(torch.cat([z, one]), torch.cat([y, label]))[-1]
        except (RuntimeError, ValueError, IndexError, TypeError):
            return float(count)  # a loss that takes no other number of samples
        part = float((share * alone).sum() / alone.square().sum())
        # A loss that is no mean over samples gives the joined one another gradient, not a share of its own.
        if not 0 < part <= 1 + 1e-6 or float((share - part * alone).norm()) > 1e-4 * float(share.norm()):
            return float(count)
        return max(1 / part - 1, 0.0)

    def _slope(self, z: Tensor, y: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(self.loss_fn(z, y).reshape(()), z, materialize_grads=True)[0]

    def loss(self, chunk: Chunk) -> Tensor:
        """The mean loss of a chunk; call inside :meth:`ready`."""
        return self.scalar(self.loss_fn(self.outputs(chunk), chunk.targets))

    def scalar(self, value: Any) -> Tensor:
        """``value``, if it is a finite scalar."""
        value = self.checked(value)
        checks.require(
            value.numel() == 1,
            f"loss_fn: it returned {checks.show(value)}, expected a scalar, the mean over the batch",
        )
        return value.reshape(())

    def checked(self, value: Any) -> Tensor:
        """``value``, if it is a finite tensor."""
        checks.require(
            isinstance(value, Tensor),
            f"loss_fn: it returned {checks.show(value)} ({type(value).__name__}), expected a tensor",
        )
        checks.require(
            _finite(value.detach(), value.detach().sum()),
            f"loss_fn: it returned {checks.show(value)} with NaN or infinite values; "
            "look for them in the inputs and targets",
        )
        return value

    @contextmanager
    def ready(self) -> Iterator[FastGraph]:
        """For building a graph: the model in the wanted mode (dropout is off in either), attention on the kernel
        that can be differentiated twice."""
        with (
            frozen(self.model, requires_grad=None),
            torch.enable_grad(),
            torch.autocast(next(iter(self.leaves.values())).device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FastGraph(not self.plain) as seen,
        ):
            if self.batchnorm == "train":
                for module in self.model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train()
            yield seen

    def either(self, work: Callable[[], T]) -> T:
        """``work()``; where that fails, again with PyTorch's own operations, by which it then stays.

        The replacements of :mod:`lineament.core.curvature.fast.graph` do not know of everything that a model may do inside.
        """
        if self.plain:
            return work()
        try:
            return work()
        except (checks.InputError, torch.OutOfMemoryError):
            raise
        except Exception:
            self.plain = True
        try:
            return work()
        except Exception:
            self.plain = False
            raise

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        device = next(iter(self.leaves.values())).device
        for batch in self.loader:
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            if not pair:
                raise checks.InputError(
                    f"loader: it yields {checks.show(batch)}, expected (inputs, targets) pairs"
                )
            if rows_in(batch[0]) > 0:
                yield tuple(widened(ordinary(moved(part, device))) for part in batch)


def chosen_parameters(model: nn.Module, params: str | Sequence[str] | None) -> list[str]:
    """The names of the parameters that names or globs ask for; all that ask for gradients by default.

    >>> chosen_parameters(nn.Linear(2, 2), "b*")
    ['bias']
    """
    known = dict(unwrapped(model).named_parameters())
    if params is None:
        found = [name for name, p in known.items() if p.requires_grad]
    else:
        patterns = [plain_name(p, known) for p in ([params] if isinstance(params, str) else params)]
        for pattern in patterns:
            if not matching(pattern, known):
                hint = crossing(pattern, known) or checks.suggest(pattern, known)
                raise checks.InputError(f"params: {pattern!r} names no parameter{hint}")
        wanted = {name for pattern in patterns for name in matching(pattern, known)}
        found = [name for name in known if name in wanted]
    away = [name for name in found or known if known[name].is_meta]
    checks.require(
        not away,
        f"model: its parameter {(away or [''])[0]!r} lies elsewhere until it is computed with (offloaded), so that it has no curvature here; load the model whole",
    )
    if not found:
        refuse_quantised(model)
        raise checks.InputError("params: the model has no parameter that asks for gradients")
    if any(opened(known[n]) is not known[n] for n in found):
        refuse_quantised(model)
    whole = [n for n in found if not known[n].is_floating_point()]
    checks.require(
        not whole, f"params: {whole[:1]} holds no real numbers, so that nothing can be differentiated"
    )
    return found


def refuse_quantised(model: nn.Module) -> None:
    """Raise where a layer has been quantised by PyTorch, whose integer arithmetic lets no gradient through.

    Raises:
        NoGradientError: such a layer, by name.
    """
    layer = quantised_layer(model)
    if layer is not None:
        raise checks.NoGradientError(
            f"model: gradients cannot pass through its quantised layer {layer}; give the network as it was before it was quantised"
        )


def _summed(loss_fn: Any, z: Tensor, y: Any) -> float | None:
    """The loss summed up instead of averaged, where PyTorch's own way of asking for that is known to it."""
    if isinstance(loss_fn, nn.Module):
        if getattr(loss_fn, "reduction", None) != "mean":
            return None
        setattr(loss_fn, "reduction", "sum")  # noqa: B010
        try:
            return float(loss_fn(z, y))
        finally:
            setattr(loss_fn, "reduction", "mean")  # noqa: B010
    function = getattr(loss_fn, "func", loss_fn)
    if getattr(function, "__module__", "") != F.__name__:
        return None
    if getattr(loss_fn, "keywords", {}).get("reduction", "mean") != "mean":
        return None
    return float(loss_fn(z, y, reduction="sum"))


def _whole(value: float) -> float:
    """A count, freed of the rounding that it was measured with."""
    return float(round(value)) if abs(value - round(value)) < 1e-5 * value else value


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def _finite(tensor: Tensor, total: Tensor) -> bool:
    # A finite sum needs one pass and no memory; the exact test is for a sum that overflows.
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor.detach()).all())


def _sliced(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {key: value[part] for key, value in inputs.items()}
    return type(inputs)(x[part] for x in inputs) if isinstance(inputs, (tuple, list)) else inputs[part]
