"""Which minima does training end in? SAM and ASAM, around any optimizer: descend along the gradient of the worst point nearby.

Foret, Kleiner, Mobahi, Neyshabur, arXiv 2010.01412; Kwon, Kim, Park, Choi, arXiv 2102.11600. A step has two passes: climb to w + e, take
the gradient there, go back to w bit by bit (from a copy, not by subtraction), and let the wrapped optimizer step. Its parameter groups
and state are the wrapper's own objects, so schedulers, clipping and checkpoints see one optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lineament.core import checks
from lineament.core.models import buffers_kept, made_trainable

_TINY = 1e-12
# Of float16: what is divided by a gradient close to zero is soon beyond it.
_LARGEST = 65504.0
# Elements of a block, for each thread.
_BLOCK = 2**16


class SAM(Optimizer):
    """Sharpness-aware minimisation around an optimizer: its step with the gradient at w + ρ g/(‖g‖ + 1e-12).

    ‖g‖ is taken over all parameters together. Weight decay and momentum of the wrapped optimizer act on the unperturbed w.
    With a closure (zero the gradients, compute the loss, call ``backward``, return the loss)::

        optimizer = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=net)
        loss = optimizer.step(closure)

    or in two halves, for loops with a gradient scaler or gradient accumulation::

        loss.backward(); optimizer.first_step(zero_grad=True)
        with running_statistics_kept(net):
            loss_fn(net(x), y).backward()
        optimizer.second_step(zero_grad=True)

    where ``step()`` without a closure is ``second_step()``.

    Args:
        base: any optimizer whose ``step`` needs no closure. It is not to be stepped by itself any more.
        rho: radius of the neighbourhood, at least 0 (0 is the wrapped optimizer alone, at twice the cost); .05 to .2 is usual. A
            parameter group may have its own ``rho`` (``sam_rho`` around an optimizer such as Adadelta, which has another ``rho``).
        model: its batch-norm layers then keep their running statistics during the second pass of ``step(closure)``: those of the
            perturbed network belong to no network that is kept.
        nonfinite: what a NaN or infinite gradient does, in either pass: ``"raise"``, or ``"skip"`` the step. Weights and state stay as
            they were in both cases; ``skipped_steps`` counts.

    Raises:
        InputError: not an optimizer, one that needs a closure or sparse gradients, a negative radius; from ``step``, a closure that returns no tensor,
            sparse gradients, NaN in the gradients, the halves out of order.

    Source: Foret et al. (2021).

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 0.5 * w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), [round(v, 4) for v in w.tolist()]  # w - 0.1 · 1.1 w
    (12.5, [2.67, 3.56])
    """

    base: Optimizer

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float = 0.05,
        model: nn.Module | None = None,
        nonfinite: str = "raise",
    ) -> None:
        checks.require(
            isinstance(base, Optimizer),
            f"base: got {checks.show(base)}, expected an optimizer, such as torch.optim.SGD(model.parameters(), lr=0.1)",
        )
        checks.require(not isinstance(base, SAM), "base: got a SAM; it cannot be wrapped twice")
        kind = type(base).__name__
        checks.require(
            not isinstance(base, torch.optim.LBFGS) and not getattr(base, "needs_closure", False),
            f"base: got {kind}, which calls the closure itself; expected an optimizer that steps on the gradients it finds",
        )
        checks.require(
            not isinstance(base, torch.optim.SparseAdam),
            f"base: got {kind}, which steps on sparse gradients only, but the perturbation needs dense ones; expected torch.optim.Adam",
        )
        checks.require(
            model is None or isinstance(model, nn.Module),
            f"model: got {checks.show(model)}, expected a torch.nn.Module or None",
        )
        checks.number("rho", rho, low=0)
        self.base = base
        self.model = model
        self.nonfinite = checks.one_of("nonfinite", nonfinite, ("raise", "skip"))
        self._copies: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []
        self.skipped_steps = 0
        self._phase = ""  # "" between steps, "up" at w + e, "skip" when this step is not to be taken
        self._key = _key_of(base)
        super().__init__(base.param_groups, {**base.defaults, self._key: rho})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer; it may bring its own ``rho``."""
        rho = checks.number(self._key, param_group.get(self._key, self.defaults[self._key]), low=0)
        if not any(param_group is g for g in self.base.param_groups):
            # Without the radius, which an optimizer that checks its options does not know.
            self.base.add_param_group({k: v for k, v in param_group.items() if k != self._key})
            param_group = self.base.param_groups[-1]
        param_group[self._key] = rho
        made_trainable(param_group["params"])

    @torch.inference_mode(False)
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb: w becomes w + e with the gradients that are there."""
        checks.require(self._phase != "up", "first_step: called twice; call second_step() or restore() first")
        self._phase = ""
        groups = [(g, g.get(self._key, self.defaults[self._key])) for g in self.param_groups]
        found = [(p, rho, bool(g.get("maximize"))) for g, rho in groups for p in g["params"]]
        found = [(p, rho, up) for p, rho, up in found if p.grad is not None]
        sparse = any(p.grad.is_sparse or p.grad.layout != torch.strided for p, _, _ in found)
        checks.require(not sparse, f"{type(self).__name__}: got sparse gradients, expected dense ones")
        params = [p for p, _, _ in found]
        grads = [p.grad for p in params]
        length = self._length(params, grads)
        if self._finite(length, "at the weights"):
            self._moved, self._phase = params, "up"
            for p in params:
                if (
                    p not in self._copies
                    or self._copies[p].shape != p.shape
                    or self._copies[p].dtype != p.dtype
                ):
                    self._copies[p] = torch.empty_like(p, requires_grad=False)
            if params:
                torch._foreach_copy_([self._copies[p] for p in params], params)  # pyright: ignore[reportPrivateImportUsage]
            for scale in {(rho, up) for _, rho, up in found}:
                rows = [i for i, (_, rho, up) in enumerate(found) if (rho, up) == scale]
                size = (-1.0 if scale[1] else 1.0) * scale[0] / (length + _TINY)
                self._climb([params[i] for i in rows], [grads[i] for i in rows], size)
        if zero_grad:
            self.zero_grad()

    @torch.inference_mode(False)
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to w, exactly, and let the wrapped optimizer step with the gradients taken at w + e."""
        checks.require(self._phase != "", "second_step: nothing to go back from; call first_step() before it")
        skip = self._phase == "skip"
        self.restore()
        if not skip:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if self._finite(_norm(grads), "at the perturbed weights"):
                self.base.step()
        self._phase = ""
        if zero_grad:
            self.zero_grad()

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back without a step; nothing happens where they are not moved.

        For loops in which something else decides whether to step: a gradient scaler that found infinities, say.
        """
        if self._moved:
            torch._foreach_copy_(self._moved, [self._copies[p] for p in self._moved])  # pyright: ignore[reportPrivateImportUsage]
        self._moved, self._phase = [], ""

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both passes; returns the loss at w. Without a closure, the second half of a step that was begun."""
        if closure is None:
            checks.require(
                self._phase != "",
                "step: SAM needs two passes; give a closure that computes the loss, calls backward and returns the loss, or "
                "call first_step() and do the second pass before step()",
            )
            return self.second_step()
        self.restore()
        with torch.enable_grad():
            loss = closure()
        checks.require(
            isinstance(loss, Tensor),
            f"closure: returned {checks.show(loss)}, expected the loss as a tensor (with its gradients computed)",
        )
        try:
            self.first_step()
            # In place, so that the gradients stay the caller's tensors; a closure that zeroes them itself is as good.
            self.zero_grad(set_to_none=False)
            if self._phase == "up":
                with torch.enable_grad(), self._statistics_kept():
                    closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, whose groups hold ``rho`` besides."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.base.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of this kind, or one of the wrapped optimizer alone, whose groups then get this one's ``rho``.

        Raises:
            InputError: a negative ``rho``; and what the wrapped optimizer raises. Nothing was changed then.
        """
        self.restore()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        for group in state_dict["param_groups"]:
            checks.number(self._key, group.get(self._key, self.defaults[self._key]), low=0)
        radii = [group.get(self._key, self.defaults[self._key]) for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, rho in zip(self.base.param_groups, radii):
            group.setdefault(self._key, rho)
        self._share()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made between the halves would hold moved weights without the way back.
        self.restore()
        keep = ("base", "model", "nonfinite", "skipped_steps", "defaults")
        return {key: self.__dict__[key] for key in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {"_copies": {}, "_moved": [], "_phase": "", "_key": _key_of(state["base"])}
        super().__setstate__({**state, **fresh})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def _length(self, params: list[Tensor], grads: list[Tensor]) -> float:
        """The joint norm that divides the perturbation."""
        return _norm(grads)

    def _climb(self, params: list[Tensor], grads: list[Tensor], size: float) -> None:
        if abs(size) <= _LARGEST:
            torch._foreach_add_(params, grads, alpha=size)  # pyright: ignore[reportPrivateImportUsage]
            return
        for p, grad in zip(params, grads):
            p.add_((_wide(grad) * size).to(p))

    def _finite(self, length: float, where: str) -> bool:
        if math.isfinite(length):
            return True
        self._phase = "skip"
        if self.nonfinite == "raise":
            self._phase = ""
            raise checks.InputError(
                f"{type(self).__name__}: the gradient {where} has NaN or infinite values{self._first_bad()}; the weights are as before. "
                "Lower the learning rate or rho, or pass nonfinite='skip'"
            )
        self.skipped_steps += 1
        return False

    def _first_bad(self) -> str:
        every = [p for group in self.param_groups for p in group["params"]]
        for index, p in enumerate(every):
            bad = 0 if p.grad is None else int((~torch.isfinite(p.grad)).sum())
            if bad:
                return f", first in parameter {index}: {bad} of {p.numel()} values are NaN or infinite"
        return " in its length"

    def _statistics_kept(self) -> Any:
        return nullcontext() if self.model is None else running_statistics_kept(self.model)


class ASAM(SAM):
    """Adaptive SAM: the step with the gradient at w + ρ w² g/(‖|w| g‖ + 1e-12), element by element.

    The neighbourhood scales with each weight, so that networks that compute the same with rescaled layers are perturbed alike.
    Biases are no exception. The arguments are those of :class:`SAM`; ``rho`` from .5 to 2 is usual.

    Source: Kwon et al. (2021).

    >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = ASAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    >>> w.sum().backward(); optimizer.first_step()  # w + (1, 4)/√5
    >>> [round(v, 4) for v in w.tolist()]
    [1.4472, 3.7889]
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float = 0.5,
        model: nn.Module | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(base, rho=rho, model=model, nonfinite=nonfinite)

    def _length(self, params: list[Tensor], grads: list[Tensor]) -> float:
        # Signs do not change a norm: |w| g is as long as w g.
        return _norm(w * g for p, grad in zip(params, grads) for w, g in _blocks(_wide(p), _wide(grad)))

    def _climb(self, params: list[Tensor], grads: list[Tensor], size: float) -> None:
        for p, grad in zip(params, grads):
            wide = _wide(p)
            for w, g in _blocks(wide, _wide(grad)):
                w.addcmul_(w, w * g, value=size)
            if wide.dtype != p.dtype and not p.is_complex():
                p.copy_(wide)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Layers in train mode use their batch's statistics but do not gather them: batch norms, and whatever else writes into a buffer.

    >>> net = nn.BatchNorm1d(2)
    >>> with running_statistics_kept(net):
    ...     _ = net(torch.ones(4, 2))
    >>> net.running_mean.tolist(), int(net.num_batches_tracked)
    ([0.0, 0.0], 0)
    """
    layers = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        # A batch norm's are not even written; for all others there is only the way back.
        with buffers_kept(model):
            yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _key_of(base: Optimizer) -> str:
    """What the radius is called in the parameter groups, which are the wrapped optimizer's too."""
    return "sam_rho" if "rho" in base.defaults else "rho"


def _blocks(w: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in blocks whose products stay in a CPU's cache, which a product of whole tensors leaves."""
    size = _BLOCK * torch.get_num_threads()
    if w.is_cpu and w.numel() > size and w.is_contiguous() and g.is_contiguous():
        yield from zip(w.view(-1).split(size), g.view(-1).split(size))
    else:
        yield w, g


def _wide(t: Tensor) -> Tensor:
    """Complex numbers as pairs; half precision as single, whose range a squared weight times its gradient does not leave."""
    if t.is_complex():
        return torch.view_as_real(t)
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _norm(tensors: Iterable[Tensor]) -> float:
    """The joint Euclidean norm, gathered in at least single precision."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        half = t.dtype in (torch.float16, torch.bfloat16)
        length = torch.linalg.vector_norm(t, dtype=torch.float32 if half else None)
        found.setdefault((length.device, length.dtype), []).append(length)
    return math.hypot(*(float(torch.linalg.vector_norm(torch.stack(lengths))) for lengths in found.values()))
