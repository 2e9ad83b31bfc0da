"""How can a first layer learn from dark pictures as from bright ones? Step on its outputs instead of its weights.

Petersen, Borgelt, Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970. The weight gradient
of a layer fed by data grows with the size of its inputs; TrAct replaces it by the least-squares solution of "change the outputs by their
gradient". Only the way from this use of the weight to its gradient changes: the layer keeps its own forward and backward kernels, its
parameters and their names, and the gradients of bias and input are the ordinary ones.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.learn.tract.layer_choice import candidates, check_accumulation, choose_layer
from lineament.learn.tract.ridge import RidgeGradient
from lineament.learn.tract.rows import Use
from lineament.learn.tract.weight_use import is_swapped, register, release, swapped_class


def tract(
    model: nn.Module,
    *,
    lam: float = 0.1,
    layer: str | None = None,
    samples: int | None = None,
    every: int = 1,
    momentum: float = 0.0,
    accumulate: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | Literal["world"] | None = None,
    nonfinite: Literal["raise", "skip", "pass"] = "raise",
    seed: int = 0,
) -> Tract:
    """Train the first layer's pre-activations: from now on its weight gets the TrAct gradient, until that is undone.

    With N input rows X and G = ∂L/∂Z of the outputs Z = X Wᵀ, the ordinary gradient Gᵀ X becomes

        Gᵀ X (Xᵀ X / N + λ I)⁻¹,

    the D that minimises ‖N Gᵀ - D Xᵀ‖² + λ N ‖D‖². Rows are the tokens of a linear layer, the patches of a convolution (N counts patches;
    each group has its own Xᵀ X) and the one-hot vectors of an embedding (row i is divided by the frequency of token i plus λ). Any optimizer
    takes it as the gradient, also one that was made before.

    Args:
        model: changed in place; its parameters and the names in its state dict stay. DistributedDataParallel and compiled models too.
        lam: λ. The paper's 0.1 suits standardised inputs; 0.2 for long training, 0.05 for short. 0 needs more rows than columns, of
            full rank. For an embedding it counts beside token frequencies, so it should be smaller than those.
        layer: the name of the layer; ``None`` takes the first linear, convolution or embedding layer in the order of registration.
        samples: stochastic form: Xᵀ X from this many random rows instead of all.
        every: stochastic form: Xᵀ X and its factor anew only at every so many backward passes.
        momentum: stochastic form: a running mean of Xᵀ X / N with this weight on its past, corrected for its start.
        accumulate: this optimizer's step follows several backward passes: gather Xᵀ X over them, and correct the summed gradient once
            before the step, which gives the gradient of one large batch. Without it each pass is corrected by itself. Before clipping
            gradients, call :meth:`Tract.correct`.
        process_group: sum Xᵀ X over these processes (``"world"``: all), so that data-parallel training gives the gradient of the joint
            batch. ``None`` corrects on each process by itself, as the paper's code does.
        nonfinite: on NaN or infinite values in the layer's input or gradient ``"raise"`` an error, ``"skip"`` the batch (a zero gradient
            for this weight), or ``"pass"`` them on, which ``torch.amp.GradScaler`` needs.
        seed: for ``samples``.

    Returns:
        A :class:`Tract`; its ``undo``, or the end of a with-block around it, gives the plain layer back.

    Raises:
        InputError: no such layer, or a shared, frozen or unsupported one (the message names candidates); options out of range. During
            the forward, a layer found by itself whose input comes from trainable layers, or a subclass whose own forward hides what its
            weight is multiplied with; during the backward, values that are not finite, or a singular Xᵀ X with λ = 0.

    Source: arXiv 2410.23970, section 3, lemma 1.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Tanh())
    >>> x = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    >>> with tract(net, lam=0.5):
    ...     net[0](x).sum().backward()
    >>> [round(g, 4) for g in net[0].weight.grad[0].tolist()]  # (3, 0.5) becomes 3 / (9/2 + 0.5), 0.5 / (0.25/2 + 0.5)
    [0.6, 0.8]
    """
    number("lam", lam, low=0)
    number("every", every, low=1, integer=True)
    number("momentum", momentum, low=0, high=1, open_high=True)
    one_of("nonfinite", nonfinite, ("raise", "skip", "pass"))
    if samples is not None:
        number("samples", samples, low=1, integer=True)
    name, module = choose_layer(model, layer)
    require(
        not is_swapped(module),
        f"layer {name!r}: trains its pre-activations already; undo that first",
    )
    stochastic = samples is not None or every > 1 or momentum > 0
    if accumulate is not None:
        check_accumulation(accumulate, name, module, stochastic)
    group = dist.group.WORLD if process_group == "world" else process_group
    require(
        process_group is None or (dist.is_available() and dist.is_initialized()),
        "process_group: torch.distributed is not initialised; call init_process_group first",
    )
    others = [other for other in candidates(model) if other != name][:5]
    gradient = RidgeGradient(
        name, lam=lam, samples=samples, every=every, momentum=momentum, group=group, nonfinite=nonfinite, seed=seed
    )  # fmt: skip
    return Tract(model, name, module, gradient, accumulate, others if layer is None else None)


class Tract:
    """A first layer that trains its pre-activations, as :func:`tract` makes it; a context manager.

    Attributes:
        layer: the layer's name.
        module: the layer.
        gradient: how its weight's gradient is made; ``gradient.lam`` may be changed between steps, ``gradient.count`` says how many
            gradients have been corrected, and ``gradient.state_dict()`` is what a resumed run with ``samples``, ``every`` or ``momentum`` needs.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        module: nn.Module,
        gradient: RidgeGradient,
        accumulate: torch.optim.Optimizer | None,
        others: list[str] | None,
    ):
        self.layer, self.module, self.gradient = layer, module, gradient
        self._number = register(self)
        self._plain: type[nn.Module] | None = type(module)
        self._others, self._warned = others, False
        self._accumulates = accumulate is not None
        self._summed = False  # whether a gradient of this round's micro-batches was not zero
        self._hook = None if accumulate is None else accumulate.register_step_pre_hook(self._before_step)
        self._compiled = "torch._dynamo" in sys.modules and any(
            isinstance(m, sys.modules["torch._dynamo"].OptimizedModule)
            or vars(m).get("_compiled_call_impl") is not None
            for m in model.modules()
        )
        weight: Any = module.weight
        self._swap(swapped_class(type(module), self._number, weight.shape))

    def undo(self) -> None:
        """Give the layer its ordinary backward again; a second call changes nothing."""
        if self._plain is None:
            return
        release(self._number)
        self._swap(self._plain)
        self._plain = None
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> Tract:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def correct(self) -> None:
        """With ``accumulate``: correct the weight's summed gradient now, instead of right before the step.

        Raises:
            InputError: without ``accumulate``, where every backward pass corrects its own gradient.
        """
        require(
            self._accumulates,
            "correct: each backward pass corrects its gradient by itself; tract(..., accumulate=optimizer) leaves that to the step",
        )
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        if weight.grad is not None and self.gradient.gathered is not None:
            new = self.gradient.of_gathered(weight.grad)
            if new.is_sparse:
                weight.grad = new
            else:
                # In place: DistributedDataParallel may keep the gradient inside its own buckets.
                weight.grad.copy_(new)

    def _swap(self, other: type[nn.Module]) -> None:
        self.module.__class__ = other
        if self._compiled:
            # Compiled code does not look whether a layer's class has changed.
            torch.compiler.reset()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        require(
            all(value is None or value is optimizer for value in (*args, *kwargs.values())),
            "accumulate: the optimizer's step was given a closure, whose backward passes come after the correction; leave accumulate out",
        )
        self.correct()

    def backward(self, gradient: Tensor, x: Tensor, use: Use) -> Tensor:
        """The weight's gradient to go on with, from one use's ordinary gradient and the layer's input."""
        if not self._accumulates:
            return self.gradient.of_batch(gradient, x, use)
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        # A sum that was not zero and is now has been zeroed in place; micro-batches without a gradient keep their rows.
        anew = weight.grad is None or (self._summed and not _any(weight.grad))
        self.gradient.gather(x, use, anew=anew)
        self._summed = (self._summed and not anew) or _any(gradient)
        return gradient

    def look_at(self, x: Any) -> None:
        """Refuse or warn where the layer's input is no data."""
        require(
            isinstance(x, Tensor),
            f"layer {self.layer!r}: got {show(x)}, expected a tensor as its first argument",
        )
        if self._warned or x.grad_fn is None:
            return
        self._warned = True
        words = f"layer {self.layer!r}: its input comes from trainable layers, so it is not fed by data"
        if self._others is not None:
            others = ", ".join(map(repr, self._others)) or "none"
            raise InputError(
                f"{words} alone; name the first layer with layer=... (this one, or among: {others})"
            )
        warnings.warn(f"{words}; TrAct deeper in a network is outside the paper", UserWarning, stacklevel=5)

    def look_at_weight(self, weight: Tensor) -> None:
        """Refuse what a forward of the layer's own has made of the weight, where its gradient is corrected afterwards."""
        require(
            not self._accumulates or weight is self.module._parameters.get("weight"),
            f"accumulate: the forward of layer {self.layer!r} changes its weight before it uses it, so that its gradient cannot be corrected "
            "afterwards; leave accumulate out",
        )


def _any(gradient: Tensor) -> bool:
    return bool((gradient._values() if gradient.is_sparse else gradient).any())
