"""diffGrad: Adam whose every coordinate is slowed down where its gradient stands still.

Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, "diffGrad: An Optimization Method for Convolutional Neural Networks", IEEE TNNLS
2020, arXiv 1909.11015. The friction lies in [1/2, 1), and gradients of ordinary networks change little from step to step: expect
Adam at half the rate, and compare with both (``track_friction`` shows what it was). Not invariant to the loss's scale, so
gradients must be unscaled and clipped before the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lineament.core import checks
from lineament.optim.diffgrad import steps
from lineament.optim.diffgrad.compiled import Passes
from lineament.optim.diffgrad.foreign_states import translated
from lineament.optim.diffgrad.frictions import STATISTICAL, FrictionSummary, known_version, summarise

_STATISTICS = ("grad_mean", "grad_spread")


class DiffGrad(torch.optim.Optimizer):
    """diffGrad: θ -= lr · ξ_t · m̂_t / (√v̂_t + eps), with the friction ξ_t = sigmoid(|g_{t-1} - g_t|).

    m̂ and v̂ are Adam's bias-corrected moments. g_0 = 0, and each parameter counts its own steps.

    Args:
        params: tensors, (name, tensor) pairs or groups; every number and flag below may differ by group.
        lr: a number, or a tensor of one element (which stays on the device with ``capturable``).
        betas: decay of m and of v, each in [0, 1).
        eps: see ``eps_mode``.
        weight_decay: added to the gradient times θ, or with ``decoupled_weight_decay`` applied as θ *= 1 - lr · weight_decay.
        version: the friction, 0 to 5 (:func:`~lineament.optim.diffgrad.friction`); 3 to 5 are experimental and keep two more buffers.
        eps_mode: ``"paper"`` as in the formula and in torch's Adam; ``"code"`` adds eps to √v before the bias correction, as released.
        amsgrad: divide by the greatest v so far.
        rectify: RAdam's rectification; while it does not apply, ``"momentum"`` takes the step lr · m̂ and ``"skip"`` none.
        maximize: go up.
        fixed_friction: this number instead of ξ: 1 is Adam, 1/2 Adam at half the rate. A control.
        nonfinite: what a NaN or infinite gradient does: ``"propagate"`` as torch's optimizers, ``"raise"`` before anything changes, or
            ``"skip"`` the whole step (counted in ``skipped_steps``). The last two read every gradient once more.
        track_friction: measure the friction at each step for :meth:`friction_summary`; costs about another step.
        alias_previous_grad: the released code's first version, which kept a reference to ``p.grad`` for the previous gradient (and added
            the decay to ``p.grad`` in place). Where ``.grad`` is filled in place, its friction is 1/2 from the second step on.
        foreach: many tensors in one kernel. Default: on accelerators. A CPU is faster by blocks that stay in its cache.
        compiled: one pass over memory by ``torch.compile`` (a C++ compiler or Triton is needed; the first step compiles). Meant for CPUs: on a GPU its
            calls cost more than the kernels over lists unless the tensors are large (an H200, 11 million parameters in 53 tensors: 2.7 times the time).
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
        differentiable: bool = False,
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        _check(defaults)
        self.skipped_steps = 0
        self._friction: FrictionSummary | None = None
        self._passes: dict[int, Passes] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked as the constructor's are."""
        if isinstance(param_group, dict):
            unknown = sorted(set(param_group) - {"params", "initial_lr", *self.defaults})
            for name in unknown:
                near = checks.suggest(name, self.defaults, most=1)
                checks.require(
                    not near.startswith("; nearest"), f"param group: unknown option {name!r}{near}"
                )
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"skipped_steps": self.skipped_steps, "_friction": self._friction}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_friction", None)
        self._passes = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, of ``pytorch_optimizer.DiffGrad``, of ``torch_optimizer.DiffGrad`` or of Adam.

        The others' options become ours (``eps_mode="code"``, what ``weight_decouple`` says, ...); options they do not store stay as here. What a state
        lacks (Adam's has no previous gradient) starts at zero, with a warning.

        Raises:
            InputError: options of theirs that have no equal here, or out of range; and what ``torch.optim`` raises for groups that do not
                match. Nothing was changed then.
        """
        loaded = translated(state_dict, self.param_groups, self.defaults)
        if len(loaded["param_groups"]) == len(self.param_groups):
            for group in loaded["param_groups"]:
                _check(group)
        super().load_state_dict(loaded)
        missing = set()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state:
                    missing |= self._complete(state, p, group, _names(group))
        if missing:
            warnings.warn(
                f"the loaded state has no {', '.join(sorted(missing))}: starting from zero", stacklevel=2
            )

    def _complete(
        self, state: dict[str, Any], p: Tensor, group: dict[str, Any], wanted: Sequence[str]
    ) -> set[str]:
        """Add to a state what the group's options need; the names of what was added."""
        missing = [name for name in wanted if name not in state]
        for name in missing:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "step" not in state:
            device = p.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return set(missing)

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
        groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        for group in self.param_groups:
            params = []
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.is_sparse:
                    raise checks.InputError(
                        f"{self._name(group, p)}: its gradient is sparse, but v and the friction need every coordinate; use dense "
                        "gradients (nn.Embedding(sparse=False)) or torch.optim.SparseAdam"
                    )
                params.append(p)
            groups.append((group, params))
        if not self._usable(groups):
            self.skipped_steps += 1
            return loss
        room = steps.scratches()
        ready = [(group, self._prepared(group, params)) for group, params in groups]
        if any(group["track_friction"] for group, _ in ready):
            self._friction = summarise(self._measured(ready))
        for group, found in ready:
            self._move(group, found, room)
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

    def _name(self, group: dict[str, Any], p: Tensor) -> str:
        """How messages and summaries call a parameter: its name, or its place."""
        at = next(i for i, q in enumerate(group["params"]) if q is p)
        if "param_names" in group:
            return group["param_names"][at]
        which = next(i for i, g in enumerate(self.param_groups) if g is group)
        return f"group {which}, parameter {at}"

    def _usable(self, groups: Iterable[tuple[dict[str, Any], list[Tensor]]]) -> bool:
        """Whether to step; raises where a group's policy says so."""
        usable = True
        for group, params in groups:
            if group["nonfinite"] == "propagate" or (group["nonfinite"] == "skip" and not usable):
                continue
            for p in params:
                bad = int((~torch.isfinite(cast(Tensor, p.grad))).sum())
                if bad and group["nonfinite"] == "raise":
                    raise checks.InputError(
                        f"{self._name(group, p)}: {bad} of {p.numel()} values of its gradient are NaN or infinite; nothing was "
                        'changed (nonfinite="skip" leaves such steps out)'
                    )
                usable = usable and not bad
        return usable

    def _prepared(
        self, group: dict[str, Any], params: list[Tensor]
    ) -> list[tuple[Tensor, steps.Buffers, steps.Coefficients]]:
        """Each parameter with its buffers and the numbers of its next step; counts the step."""
        names = _names(group)
        needed = {"step", *names}
        states = [self.state[p] for p in params]
        for p, state in zip(params, states):
            if not needed <= state.keys():
                self._complete(state, p, group, names)
        counters = [state["step"] for state in states]
        if counters:
            _count(counters)
        rest = [name if name in names else None for name in ("max_exp_avg_sq", *_STATISTICS)]
        found = []
        numbers: dict[float, steps.Coefficients] = {}
        on_device = steps.coefficients_of_all(group, counters) if group["capturable"] else []
        for at, (p, state, counter) in enumerate(zip(params, states, counters)):
            if on_device:
                c = on_device[at]
            else:
                t = counter.item()
                if t not in numbers:
                    numbers[t] = steps.coefficients(group, t, float(group["lr"]))
                c = numbers[t]
            b = steps.Buffers(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["previous_grad"])  # pyright: ignore[reportArgumentType]
            if len(names) > 3:
                b = steps.Buffers(*b[:5], *(None if name is None else state[name] for name in rest))
            if p.is_complex():
                b = steps.Buffers(*(None if t is None else torch.view_as_real(t) for t in b))  # pyright: ignore[reportArgumentType]
            found.append((p, b, c))
        return found

    def _move(
        self,
        group: dict[str, Any],
        found: list[tuple[Tensor, steps.Buffers, steps.Coefficients]],
        room: Callable[[Tensor, int], Tensor],
    ) -> None:
        rule = _rule(group)
        if rule.alias:
            for p, b, c in found:
                if group["weight_decay"]:
                    b.g.add_(b.p, alpha=group["weight_decay"])
                steps.update(b, c, rule._replace(l2=False))
                self.state[p]["previous_grad"] = p.grad
            return
        foreach = group["foreach"]
        if foreach is None:
            foreach = not group["compiled"] and all(p.device.type not in ("cpu", "mps") for p, _, _ in found)
        if foreach:
            lists: dict[Any, list[tuple[steps.Buffers, steps.Coefficients]]] = {}
            for _, b, c in found:
                kind = True if isinstance(c.step, Tensor) else (bool(c.step), bool(c.plain))
                lists.setdefault((b.p.device, b.p.dtype, kind), []).append((b, c))
            for pairs in lists.values():
                steps.in_lists([b for b, _ in pairs], [c for _, c in pairs], rule)
            return
        if group["compiled"]:
            found = self._compiled(group, rule).move(found)
        for _, b, c in found:
            steps.in_blocks(b, c, rule, room)

    def _compiled(self, group: dict[str, Any], rule: steps.Rule) -> Passes:
        place = next(i for i, g in enumerate(self.param_groups) if g is group)
        kept = self._passes.get(place)
        if kept is None or kept.rule != rule:
            kept = self._passes[place] = Passes(rule)
        return kept

    def _measured(self, ready: list[Any]) -> Iterable[tuple[str, Tensor]]:
        for group, found in ready:
            rule = _rule(group)
            for p, b, c in found if group["track_friction"] else ():
                b = steps.Buffers(*(t if t is None or t is b.p else _wide(t) for t in b))  # pyright: ignore[reportArgumentType]
                g = -b.g if rule.maximize else b.g
                if rule.l2:
                    g = g + _wide(b.p) * group["weight_decay"]
                yield self._name(group, p), steps.frictions(b.q - g, b, c, rule)


def _count(counters: list[Tensor]) -> None:
    if any(t.device.type != "cpu" for t in counters):
        torch._foreach_add_(counters, 1)  # pyright: ignore[reportPrivateImportUsage]
    else:
        # A number, as a tensor without ``alpha``, would be made into a tensor again for each counter.
        torch._foreach_add_(counters, torch.ones(()), alpha=1.0)  # pyright: ignore[reportPrivateImportUsage]


def _names(group: dict[str, Any]) -> tuple[str, ...]:
    """The buffers that the group's options need."""
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "previous_grad")
    if group["amsgrad"]:
        names += ("max_exp_avg_sq",)
    if group["version"] in STATISTICAL and group["fixed_friction"] is None:
        names += _STATISTICS
    return names


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _rule(group: dict[str, Any]) -> steps.Rule:
    decayed = bool(group["weight_decay"])
    decoupled = group["decoupled_weight_decay"]
    return steps.Rule(
        group["version"],
        group["fixed_friction"],
        group["maximize"],
        decayed and not decoupled,
        decayed and decoupled,
        group["alias_previous_grad"],
        group["rectify"] is not None,
    )


def _check(options: dict[str, Any]) -> None:
    """Every option of one group, and those that exclude each other."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        checks.require(
            lr.numel() == 1, f"lr: got {checks.show(lr)}, expected a number or a tensor of one element"
        )
        if not options["capturable"]:
            checks.number("lr", lr.item(), low=0)
    else:
        checks.number("lr", lr, low=0)
    betas = options["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    checks.require(pair, f"betas: got {checks.show(betas)}, expected a pair of numbers")
    for beta in betas:
        checks.number("betas", beta, low=0, high=1, open_high=True)
    for name in ("eps", "weight_decay"):
        checks.number(name, options[name], low=0)
    known_version(options["version"])
    checks.one_of("eps_mode", options["eps_mode"], ("paper", "code"))
    checks.one_of("nonfinite", options["nonfinite"], ("propagate", "skip", "raise"))
    if options["rectify"] is not None:
        checks.one_of("rectify", options["rectify"], ("momentum", "skip"))
    if options["fixed_friction"] is not None:
        checks.number("fixed_friction", options["fixed_friction"], low=0)
    on = {name for name, value in options.items() if value is True or (name == "rectify" and value)}
    checks.require(
        "differentiable" not in on,
        "differentiable: got True, but diffGrad's step works in place and has no derivative here; expected False",
    )
    if options["nonfinite"] != "propagate":
        on.add("nonfinite")
    excluded = {
        "foreach": ("compiled", "alias_previous_grad"),
        "capturable": ("rectify", "nonfinite", "track_friction"),
        "alias_previous_grad": ("compiled", "maximize", "decoupled_weight_decay", "capturable"),
    }
    for name, others in excluded.items():
        for other in others:
            checks.require(
                not {name, other} <= on,
                f"{name} and {other}: got both, but they exclude each other; leave one at its default",
            )
