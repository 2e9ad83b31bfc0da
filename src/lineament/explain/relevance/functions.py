"""The backward rules of layer-wise relevance propagation, each as a value that passes unchanged and a gradient that does not.

Rezaei Jafari et al. 2025 (arXiv 2508.21258) for LN, identity, half and AH; Montavon et al. 2019 for epsilon and gamma; Achtibat et al. 2024
(arXiv 2402.05602) for the uniform rule of attention. Every function takes the module's real output and returns it bit for bit: only what its
backward hands down differs. A factor that a rule holds constant is computed in the backward pass from the saved input, never stored beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lineament.core.checks import InputError, require

Factor = Callable[[Tensor], Tensor]


class Ruled(torch.autograd.Function):
    """``output`` as it is; the gradient of ``x`` is ``rule(x, v)`` for the upstream coefficient v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x)
        # Handed over as written to: no copy, and in-place operations behind it stay allowed, which they are not on a view.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.rule(x, grads[0]).to(x.dtype), None, None


class Scaled(torch.autograd.Function):
    """``x`` as it is, its gradient times a factor (a number, or a vector over the last dimension)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


def wide(x: Tensor) -> Tensor:
    """At least float32: statistics and coefficients of half-precision models are computed there."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def normalised(
    weight: Tensor | None, eps: float, *, centred: bool, dims: int = 1
) -> Callable[[Tensor, Tensor], Tensor]:
    """The LN-rule: the statistic is a constant, so that c = v·w/σ, less its mean where the norm subtracts one."""
    over = tuple(range(-dims, 0))

    def rule(x: Tensor, v: Tensor) -> Tensor:
        x, v = wide(x), wide(v)
        c = v if weight is None else v * weight.to(v.dtype)
        if not centred:
            return c * (x.square().mean(over, keepdim=True) + eps).rsqrt()
        # The norm's own 1/σ, in one pass.
        c = c * torch.native_layer_norm(x, x.shape[-dims:], None, None, eps)[2]
        return c - c.mean(over, keepdim=True)

    return rule


def identity(factor: Factor) -> Callable[[Tensor, Tensor], Tensor]:
    """The identity rule: phi(x)/x is a constant, so that c = v·phi(x)/x."""
    return lambda x, v: wide(v) * factor(wide(x))


_TANH_GELU = math.sqrt(2.0 / math.pi)


def _gelu(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _tanh_gelu(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh u) is sigmoid(2u), with u = x·(a + b·x²) in one piece of memory.
    return x.square().mul_(2 * _TANH_GELU * 0.044715).add_(2 * _TANH_GELU).mul_(x).sigmoid_()


_FACTORS: dict[str, Factor] = {
    "SiLU": torch.sigmoid,
    "SiLUActivation": torch.sigmoid,
    "NewGELUActivation": _tanh_gelu,
    "GELUTanh": _tanh_gelu,
    "PytorchGELUTanh": _tanh_gelu,
    "FastGELUActivation": _tanh_gelu,
    "AccurateGELUActivation": _tanh_gelu,
    "QuickGELUActivation": lambda x: torch.sigmoid(1.702 * x),
    "Mish": lambda x: torch.tanh(F.softplus(x)),
    "MishActivation": lambda x: torch.tanh(F.softplus(x)),
    "Hardswish": lambda x: F.hardsigmoid(x),
}
# Homogeneous already: the gradient is the identity rule.
_PLAIN = ("ReLU", "LeakyReLU", "PReLU", "Identity", "LinearActivation")


def factor_of(module: nn.Module, name: str) -> Factor | None:
    """phi(x)/x of an activation module in closed form where there is one; ``None`` where the plain gradient is the rule already.

    Other activations with phi(0) = 0 use phi(x)/x, and phi'(0) where \\|x\\| < 1e-6.

    Raises:
        InputError: phi(0) is not 0 (softplus, sigmoid, exp): phi(x)/x has no limit there.
    """
    kind = type(module).__name__
    if kind in _PLAIN:
        return None
    if isinstance(module, nn.GELU):
        return _tanh_gelu if module.approximate == "tanh" else _gelu
    if kind == "GELUActivation":
        return _gelu
    if kind in _FACTORS:
        return _FACTORS[kind]
    zero = torch.zeros(1, dtype=torch.float64)
    for tensor in (*module.parameters(), *module.buffers()):
        zero = torch.zeros(1, dtype=tensor.dtype, device=tensor.device)
        break
    with torch.enable_grad():
        zero.requires_grad_()
        value = module.forward(zero)
        require(
            isinstance(value, Tensor) and value.shape == zero.shape,
            f"rule 'identity': {name!r} ({kind}) is no elementwise activation",
        )
        slope = torch.autograd.grad(value.sum(), zero, allow_unused=True)[0]
    if float(value.detach()) != 0.0:
        raise InputError(
            f"rule 'identity': {name!r} ({kind}) has phi(0) = {float(value.detach()):g}, so that phi(x)/x has no limit at 0; "
            f"leave it to the plain gradient with {{{name!r}: 'gradient'}} among the rules"
        )
    at_zero = 0.0 if slope is None else float(slope)

    def factor(x: Tensor) -> Tensor:
        small = x.abs() < 1e-6
        return torch.where(small, at_zero, module.forward(x) / torch.where(small, 1.0, x))

    return factor


def norm_rule(module: nn.Module, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The LN-rule of a normalisation module: which statistic it divides by and with which weight is asked of the module itself.

    A class that is not PyTorch's is run on two probes, so that a weight stored as 1 + w (Gemma) or a class called ``LayerNorm`` that does not
    subtract the mean (T5) is taken for what it computes.

    Raises:
        InputError: it computes neither a layer norm nor an RMS norm.
    """
    if isinstance(module, nn.LayerNorm):
        return normalised(module.weight, module.eps, centred=True, dims=len(module.normalized_shape))
    if isinstance(module, nn.RMSNorm):
        first = next(module.parameters(), torch.zeros(()))
        eps = torch.finfo(first.dtype).eps if module.eps is None else module.eps
        return normalised(module.weight, eps, centred=False, dims=len(module.normalized_shape))
    weight = getattr(module, "weight", None)
    eps = next(
        (getattr(module, key) for key in ("eps", "variance_epsilon", "epsilon") if hasattr(module, key)), None
    )
    if isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(eps, float):
        size = len(weight)
        kind = {"dtype": weight.dtype, "device": weight.device}
        probe = torch.linspace(-1.0, 2.0, size, **kind) + torch.arange(size, **kind).remainder(3)
        with torch.no_grad():
            zero = torch.zeros_like(probe)
            bias = module.forward(zero)
            seen = module.forward(probe) - bias
            flat = module.forward(torch.ones_like(probe)) - bias
            effective = flat * math.sqrt(1.0 + eps)
            for centred in (False, True):
                if centred:
                    effective = weight.detach()
                x = probe - probe.mean() if centred else probe
                guess = x * (x.square().mean() + eps).rsqrt() * effective
                tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
                if torch.allclose(guess.float(), seen.float(), rtol=tolerance, atol=tolerance):
                    return normalised(effective, eps, centred=centred)
    raise InputError(
        f"rule 'ln': {name!r} ({type(module).__name__}) computes neither a layer norm nor an RMS norm of its last dimension; "
        f"leave it to the plain gradient with {{{name!r}: 'gradient'}} among the rules"
    )


def stabilised(eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The epsilon-rule as a factor on a linear map's output z: v·z/(z + eps·sign z), with sign 0 = 1."""

    def rule(z: Tensor, v: Tensor) -> Tensor:
        z = wide(z)
        # A tensor of z's dtype: two numbers alone would be float32.
        shift = z.new_tensor(eps)
        return wide(v) * z / (z + torch.where(z < 0, -shift, shift))

    return rule


def linear_map(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """``f(x, weight, bias)`` of a linear, convolution or GPT-2 ``Conv1D`` module, or ``None`` for others."""
    if isinstance(module, nn.Linear):
        return F.linear
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return lambda x, w, b: x @ w if b is None else x @ w + b
    convolutions: Any = ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
    for kind, function in convolutions:
        if isinstance(module, kind) and module.padding_mode == "zeros":
            options = (module.stride, module.padding, module.dilation, module.groups)
            return lambda x, w, b: function(x, w, b, *options)
    return None


def favoured(module: nn.Module, gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The gamma-rule for inputs of any sign: contributions x_i w_ij of the sign of the output z_j count 1 + gamma times.

    c_i = Σ_j w_ij (1 + gamma·[x_i w_ij z_j > 0]) · v_j z_j / z'_j with z'_j the sum of the contributions so weighted; a bias is one of them.
    """
    found: Any = linear_map(module)
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)

    def rule(x: Tensor, v: Tensor) -> Tensor:
        x, v = wide(x.detach()), wide(v)
        w = wide(weight.detach())
        b = None if bias is None else wide(bias.detach())
        positive, negative = w.clamp_min(0), w.clamp_max(0)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            up, down = leaf.clamp_min(0), leaf.clamp_max(0)
            z = found(leaf, w, b)
            upward = found(up, positive, None if b is None else b.clamp_min(0)) + found(down, negative, None)
            downward = found(up, negative, None if b is None else b.clamp_max(0)) + found(
                down, positive, None
            )
            weighted = z + gamma * torch.where(z > 0, upward, downward)
            held = weighted.detach()
            share = torch.where(held == 0, 0.0, v * z.detach() / torch.where(held == 0, 1.0, held))
            return torch.autograd.grad(weighted, leaf, share)[0]

    return rule
