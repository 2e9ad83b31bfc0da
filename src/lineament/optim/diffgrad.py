"""diffGrad: Adam whose step is multiplied, coordinate by coordinate, by a friction that a changing gradient releases.

Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, "diffGrad: An Optimization Method for Convolutional Neural Networks", IEEE TNNLS
2020, arXiv 1909.11015. The friction lies in [1/2, 1), and gradients of ordinary networks change little from step to step: expect
Adam at half the learning rate, and compare with both (``track_friction`` shows what it was). The method is not invariant to the scale of
the loss, so gradients must be unscaled and clipped before the step.

Every way to run a step is one function, :func:`update`, on lists of tensors. On a CPU the lists are cut into batches that stay in the
cache, which halves the time of the step; on an accelerator one list holds everything.
"""

# PyTorch's kernels over lists of tensors are public by use, not by name.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import made_trainable
from lineament.optim import frictions
from lineament.optim.diffgrad_options import check, translated
from lineament.optim.frictions import FrictionSummary

# Elements of a batch for each thread: short enough for the caches, long enough that the calls cost little (measured).
BATCH = 2**17
_LOW = (torch.float16, torch.bfloat16)
_kernels: Any = torch


class DiffGrad(torch.optim.Optimizer):
    """diffGrad: θ -= lr · ξ_t · m̂_t / (√v̂_t + eps), with the friction ξ_t = sigmoid(|g_{t-1} - g_t|).

    m̂ and v̂ are Adam's bias-corrected moments. g_0 = 0, and each parameter counts its own steps.

    Args:
        params: tensors, (name, tensor) pairs or groups; every option below may differ by group.
        lr: a number, or a tensor of one element (which stays on the device with ``capturable``).
        betas: decay of m and of v, each in [0, 1).
        eps: see ``eps_mode``.
        weight_decay: added to the gradient times θ, or with ``decoupled_weight_decay`` applied as θ *= 1 - lr · weight_decay.
        version: the friction, 0 to 5 (:func:`~lineament.optim.frictions.friction`); 3 to 5 are experimental and keep two more buffers.
        eps_mode: ``"paper"`` as in the formula and in PyTorch's Adam; ``"code"`` adds eps to √v before the bias correction, as released.
        amsgrad: divide by the maximum of v so far.
        rectify: RAdam's rectification; while it does not apply, ``"momentum"`` takes the step lr · m̂ and ``"skip"`` none.
        maximize: go up.
        fixed_friction: this number instead of ξ: 1 is Adam, 1/2 Adam at half the learning rate. A control.
        nonfinite: what a NaN or infinite gradient does: ``"propagate"`` as PyTorch's optimizers, ``"raise"`` before anything changes, or
            ``"skip"`` the whole step (counted in ``skipped_steps``). The last two read every gradient once more.
        track_friction: measure the friction at each step for :meth:`friction_summary`; costs about another step.
        alias_previous_grad: the bug of the first release, which kept a reference to ``p.grad`` for the previous gradient (and added
            the decay to ``p.grad`` in place). Where ``.grad`` is filled in place, its friction is 1/2 from the second step on.
        foreach: all tensors in one list. Default: on accelerators.
        compiled: one pass over memory by ``torch.compile`` (needs a C++ compiler or Triton; the first step compiles). Meant for CPUs: on
            a GPU it pays for large tensors only (an H200, 11 million parameters in 53 tensors: 2.7 times the time of ``foreach``).
        capturable: counters and numbers stay on the device, so that a CUDA graph can hold the step.

    Raises:
        InputError: a number out of its range, an unknown choice, options that exclude each other; at a step, sparse gradients and a
            closure that returns no tensor.

    Source: arXiv 1909.11015, Algorithm 1.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = DiffGrad([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, 0.0])
    >>> optimizer.step()
    >>> w.detach()  # the step is 0.1 * sigmoid(3)
    tensor([ 0.9047, -2.0000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        version: int = 0,
        eps_mode: str = "paper",
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        rectify: str | None = None,
        maximize: bool = False,
        fixed_friction: float | None = None,
        nonfinite: str = "propagate",
        track_friction: bool = False,
        alias_previous_grad: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        capturable: bool = False,
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        check(defaults)
        self.skipped_steps = 0
        self._friction: FrictionSummary | None = None
        self._passes: dict[int, Any] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked as the constructor's are."""
        if isinstance(param_group, dict):
            for name in sorted(set(param_group) - {"params", "initial_lr", *self.defaults}):
                near = checks.suggest(name, self.defaults, most=1)
                checks.require(
                    not near.startswith("; nearest"), f"param group: unknown option {name!r}{near}"
                )
            check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        made_trainable(self.param_groups[-1]["params"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "skipped_steps": self.skipped_steps, "_friction": self._friction}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"skipped_steps": 0, "_friction": None, **vars(self), **state, "_passes": {}})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, of ``pytorch_optimizer.DiffGrad``, of ``torch_optimizer.DiffGrad`` or of Adam.

        The others' options become ours (``eps_mode="code"``, what ``weight_decouple`` says, ...); options they do not store stay as here.
        What a state lacks (Adam's has no previous gradient) starts at zero, with a warning.

        Raises:
            InputError: options of theirs without an equivalent here, or out of range; and what ``torch.optim`` raises for groups that do
                not match. Nothing was changed then.
        """
        loaded = translated(state_dict, self.param_groups, self.defaults)
        if len(loaded["param_groups"]) == len(self.param_groups):
            for group in loaded["param_groups"]:
                check(group)
        super().load_state_dict(loaded)
        missing = set()
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    missing |= self._complete(p, group)
        if missing:
            names = ", ".join(sorted(missing))
            warnings.warn(f"the loaded state has no {names}: starting from zero", stacklevel=2)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; ``closure`` computes the loss and its gradients anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            checks.require(
                isinstance(loss, Tensor),
                f"closure: returned {checks.show(loss)}, expected the loss as a tensor",
            )
        if not self._usable():
            self.skipped_steps += 1
            return loss
        found = [self._rows(group) for group in self.param_groups]
        if any(group["track_friction"] for group in self.param_groups):
            self._friction = frictions.summarise(self._measured(found))
        for which, (group, rows) in enumerate(zip(self.param_groups, found)):
            rule = _rule(group)
            if rule.alias and rule.l2:
                for row in rows:
                    row.g.add_(row.p, alpha=group["weight_decay"])
                rule = rule._replace(l2=False)
            if group["compiled"]:
                rows = self._compiled(which, rule).move(rows)
            for batch in _batches(rows, group["foreach"]):
                update(batch, rule)
            if rule.alias:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["previous_grad"] = p.grad
        return loss

    def friction_summary(self) -> FrictionSummary:
        """The friction of the last step, over the groups that have ``track_friction`` set.

        The option may be set and unset between steps: ``optimizer.param_groups[0]["track_friction"] = True``.

        Raises:
            InputError: no step was tracked.

        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = DiffGrad([w], track_friction=True)
        >>> w.grad = torch.tensor([0.0, 100.0])
        >>> optimizer.step()
        >>> optimizer.friction_summary().mean
        0.75
        """
        if self._friction is None:
            raise checks.InputError(
                "friction_summary: no step was tracked; give DiffGrad(..., track_friction=True) and take a step"
            )
        return self._friction

    def _usable(self) -> bool:
        """Whether to step: every gradient is dense, and finite where its group wants that."""
        usable = True
        for which, group in enumerate(self.param_groups):
            for at, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise checks.InputError(
                        f"{_name(which, group, at)}: its gradient is sparse, but v and the friction need every coordinate; use dense "
                        "gradients (nn.Embedding(sparse=False)) or torch.optim.SparseAdam"
                    )
                if group["nonfinite"] == "propagate":
                    continue
                bad = int((~torch.isfinite(p.grad)).sum())
                if bad and group["nonfinite"] == "raise":
                    raise checks.InputError(
                        f"{_name(which, group, at)}: {bad} of {p.numel()} values of its gradient are NaN or infinite; nothing was "
                        'changed (nonfinite="skip" leaves such steps out)'
                    )
                usable = usable and not bad
        return usable

    def _complete(self, p: Tensor, group: dict[str, Any]) -> set[str]:
        """Add what the group's options need to a parameter's state; the names of the buffers that were added."""
        state = self.state[p]
        missing = {name for name in _buffers(group) if name not in state}
        for name in missing:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "step" not in state:
            state["step"] = torch.zeros(
                (), dtype=torch.float32, device=p.device if group["capturable"] else "cpu"
            )
        return missing

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        """What moves in this step, with the numbers of the step; counts the step."""
        params = [p for p in group["params"] if p.grad is not None]
        wanted = {"step", *_buffers(group)}
        for p in params:
            if not wanted <= self.state[p].keys():
                self._complete(p, group)
        states = [self.state[p] for p in params]
        counters = [state["step"] for state in states]
        if counters:
            _kernels._foreach_add_(counters, 1)
        if group["capturable"]:
            numbers = captured_coefficients(group, counters)
        else:
            counts = [t.item() for t in counters]
            known = {t: coefficients(group, t) for t in set(counts)}
            numbers = [known[t] for t in counts]
        rows = []
        for p, state, c in zip(params, states, numbers):
            kept = [state[name] if name in wanted else None for name in _EVERY_BUFFER]
            tensors = [p, p.grad, *kept]
            if p.is_complex():
                tensors = [None if t is None else torch.view_as_real(t) for t in tensors]
            rows.append(Row(*tensors, c))  # pyright: ignore[reportArgumentType]
        return rows

    def _compiled(self, which: int, rule: Rule) -> Any:
        """What the compiled step of a group keeps."""
        from lineament.optim.diffgrad_compiled import Passes  # which builds on this file

        if which not in self._passes or self._passes[which].rule != rule:
            self._passes[which] = Passes(rule)
        return self._passes[which]

    def _measured(self, found: Sequence[list[Row]]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and friction, before the step changes anything."""
        for which, (group, rows) in enumerate(zip(self.param_groups, found)):
            if not group["track_friction"]:
                continue
            rule = _rule(group)
            places = [at for at, p in enumerate(group["params"]) if p.grad is not None]
            for at, row in zip(places, rows):
                row = _wide(row)
                g = -row.g if rule.maximize else row.g
                g = g + row.p * row.c.decay if rule.l2 else g
                yield _name(which, group, at), _friction([row.q - g], [row], rule)[0]


class Rule(NamedTuple):
    """What is decided once for a parameter group."""

    version: int
    fixed: float | None
    maximize: bool
    l2: bool
    decoupled: bool
    alias: bool
    rectified: bool


class Coefficients(NamedTuple):
    """The numbers of one step: floats, or 0-dimensional tensors where the host must not know them."""

    w1: Any  # 1 - beta1
    w2: Any  # 1 - beta2
    step: Any  # of the adapted update; 0 where rectification forbids it
    plain: Any  # of the momentum step that is taken instead
    eps: Any
    decay: Any
    shrink: Any  # 1 - lr * decay
    before: Any  # 1 / (t - 1), 0 at the first step
    after: Any  # 1 / t


class Row(NamedTuple):
    """A parameter, its gradient, its state (the last three only where the rule needs them) and the numbers of its step."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    q: Tensor  # the previous gradient
    top: Tensor | None  # the maximum of v so far (AMSGrad)
    mean: Tensor | None  # of the gradients before this step
    spread: Tensor | None  # the sum of their squared distances to the mean
    c: Coefficients


_EVERY_BUFFER = ("exp_avg", "exp_avg_sq", "previous_grad", "max_exp_avg_sq", "grad_mean", "grad_spread")


def coefficients(group: dict[str, Any], t: float | Tensor) -> Coefficients:
    """The numbers of step ``t``, with the bias corrections folded into the step and eps; tensors when ``t`` is one."""
    beta1, beta2 = group["betas"]
    captured = isinstance(t, Tensor)
    lr = group["lr"] if captured else float(group["lr"])
    bc1, bc2 = 1 - beta1**t, 1 - beta2**t
    root = bc2**0.5
    step, plain = lr * root / bc1, 0.0
    if group["rectify"] is not None:
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / bc2
        if length >= 5:
            ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * ratio**0.5
        else:
            step, plain = 0.0, lr / bc1 if group["rectify"] == "momentum" else 0.0
    eps = group["eps"] * root if group["eps_mode"] == "paper" else group["eps"]
    before = torch.where(t > 1, 1 / (t - 1), 0) if captured else 1 / (t - 1) if t > 1 else 0.0
    decay = group["weight_decay"]
    return Coefficients(1 - beta1, 1 - beta2, step, plain, eps, decay, 1 - lr * decay, before, 1 / t)


def captured_coefficients(group: dict[str, Any], counters: Sequence[Tensor]) -> list[Coefficients]:
    """The numbers of each parameter's step where the counters are on its device: those of a device in one computation."""
    found: dict[int, Coefficients] = {}
    for device in {t.device for t in counters}:
        places = [k for k, t in enumerate(counters) if t.device == device]
        steps = torch.stack([counters[k] for k in places])
        together = coefficients(group, steps if device.type == "mps" else steps.double())  # no float64 there
        columns = [x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * len(places) for x in together]
        found |= {k: Coefficients(*each) for k, each in zip(places, zip(*columns))}
    return [found[k] for k in range(len(counters))]


def update(rows: Sequence[Row], rule: Rule) -> None:
    """One step of diffGrad, in place, for tensors of one device and dtype that take the same kind of step."""
    if rows[0].p.dtype in _LOW:
        wide = [_wide(row) for row in rows]
        update(wide, rule)
        for row, result in zip(rows, wide):
            for narrow, value in zip(row[:8], result):
                if narrow is not None and narrow is not row.g:
                    narrow.copy_(value)  # pyright: ignore[reportArgumentType]
        return
    p, g, m, v, q, top, mean, spread, cs = (list(column) for column in zip(*rows))
    c = cs[0]
    if rule.maximize:
        g = _kernels._foreach_neg(g)
    if rule.l2:
        g = _kernels._foreach_add(g, p, alpha=c.decay)
    if rule.decoupled:
        _kernels._foreach_mul_(p, [c.shrink for c in cs])
    _kernels._foreach_lerp_(m, g, c.w1)
    _kernels._foreach_mul_(v, 1 - c.w2)
    _kernels._foreach_addcmul_(v, g, g, value=c.w2)
    if top[0] is not None:
        _kernels._foreach_maximum_(top, v)
        v = top
    # The previous gradient's memory takes the change and the friction, unless it is the gradient's own.
    change = _kernels._foreach_sub(q, g) if rule.alias else q
    if not rule.alias:
        _kernels._foreach_sub_(q, g)
    xi = _friction(change, rows, rule)
    if mean[0] is not None:
        off = _kernels._foreach_sub(g, mean)
        _kernels._foreach_add_(mean, _kernels._foreach_mul(off, [c.after for c in cs]))
        _kernels._foreach_addcmul_(spread, off, _kernels._foreach_sub(g, mean))
    if isinstance(c.step, Tensor) or c.step:
        _kernels._foreach_mul_(xi, m)
        root = _kernels._foreach_sqrt(v)
        _kernels._foreach_add_(root, [c.eps for c in cs])
        if isinstance(c.step, Tensor):
            _kernels._foreach_div_(xi, root)
            _kernels._foreach_mul_(xi, [c.step for c in cs])
            _kernels._foreach_sub_(p, xi)
        else:
            _kernels._foreach_addcdiv_(p, xi, root, [-c.step for c in cs])
    elif c.plain:
        _kernels._foreach_sub_(p, _kernels._foreach_mul(m, [c.plain for c in cs]))
    if not rule.alias:
        _kernels._foreach_copy_(q, g)


def _friction(changes: list[Tensor], rows: Sequence[Row], rule: Rule) -> list[Tensor]:
    """The friction of each coordinate, in the memory of ``changes``."""
    if rule.fixed is not None:
        return [change.fill_(rule.fixed) for change in changes]
    if rule.version in frictions.STATISTICAL:
        for change, row in zip(changes, rows):
            assert row.mean is not None and row.spread is not None
            frictions.statistical_(change, rule.version, row.mean, (row.spread * row.c.before).sqrt())
        return changes
    return frictions.friction_(changes, rule.version)


def _batches(rows: Sequence[Row], foreach: bool | None) -> Iterator[list[Row]]:
    """The rows in lists for :func:`update`: all of a kind, or on a CPU as many as stay in the cache, with large tensors cut."""
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        step = True if isinstance(row.c.step, Tensor) else (bool(row.c.step), bool(row.c.plain))
        kinds.setdefault((row.p.device, row.p.dtype, step), []).append(row)
    size = BATCH * torch.get_num_threads()
    for (device, *_), alike in kinds.items():
        if foreach or (foreach is None and device.type not in ("cpu", "mps")):
            yield alike
            continue
        batch, filled = [], 0
        for row in alike:
            count = row.p.numel()
            order = memory_order(row) if count > size and device.type == "cpu" else None
            if order is not None:
                parts = [repeat(None) if t is None else in_memory(t, order).split(size) for t in row[:8]]
                for part in zip(*parts):
                    yield [Row(*part, row.c)]  # pyright: ignore[reportCallIssue]
                continue
            if filled + count > size and batch:
                yield batch
                batch, filled = [], 0
            batch.append(row)
            filled += count
        if batch:
            yield batch


def memory_order(row: Row) -> Sequence[int] | None:
    """The axes as a parameter and its state have them in memory, or ``None`` where they have no common order."""
    if type(row.p) not in (Tensor, nn.Parameter):  # a distributed tensor has its own ideas of memory
        return None
    order = sorted(range(row.p.ndim), key=row.p.stride, reverse=True)
    kept = (t for t in (row.p, *row[2:8]) if t is not None)
    return order if all(t.permute(order).is_contiguous() for t in kept) else None


def in_memory(t: Tensor, order: Sequence[int]) -> Tensor:
    """A tensor as a vector in the order of memory: a view where it lies so, else a copy.

    >>> in_memory(torch.tensor([[1, 2], [3, 4]]), (1, 0))
    tensor([1, 3, 2, 4])
    """
    return t.permute(*order).reshape(-1)


def _wide(row: Row) -> Row:
    """In float32 where the tensors are half precision."""
    return Row(*(t.float() if isinstance(t, Tensor) and t.dtype in _LOW else t for t in row[:8]), row.c)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _name(which: int, group: dict[str, Any], at: int) -> str:
    return group["param_names"][at] if "param_names" in group else f"group {which}, parameter {at}"


def _buffers(group: dict[str, Any]) -> Iterable[str]:
    """The state that the group's options need, besides the count of steps."""
    statistical = group["version"] in frictions.STATISTICAL and group["fixed_friction"] is None
    return (*_EVERY_BUFFER[:3], *_EVERY_BUFFER[3:4] * group["amsgrad"], *_EVERY_BUFFER[4:] * statistical)


def _rule(group: dict[str, Any]) -> Rule:
    decayed, decoupled = bool(group["weight_decay"]), group["decoupled_weight_decay"]
    return Rule(
        group["version"],
        group["fixed_friction"],
        group["maximize"],
        decayed and not decoupled,
        decayed and decoupled,
        group["alias_previous_grad"],
        group["rectify"] is not None,
    )
