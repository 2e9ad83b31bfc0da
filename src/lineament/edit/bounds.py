"""How much can a change of one layer move the answers? The measured ratio, and a sound worst case.

Kashyap et al., NeurIPS 2025, arXiv 2511.19566, section 1.3: E |N(X) - N'(X)|² <= C² Σ_c E |Y_c - Y'_c|² with C the product of the Lipschitz constants of what
follows. The norm of a reshaped kernel does not bound a convolution (3 x 3 of ones: its operator norm is 9, that of the matrix 3), so that every linear step
is bounded by power iteration on the operator itself. The worst case is usually far above what is measured.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core.checks import InputError, require, show
from lineament.core.models import called, frozen, logits, weight_of
from lineament.core.sites.hooks import tap
from lineament.core.surgery.groups import plain_network
from lineament.edit.layers import Inputs, layers_of, moments, ready
from lineament.edit.patches import matrix, unmatrixed
from lineament.edit.repairs import left_over

# The largest slope of each activation.
_SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0, nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Tanh: 1.0, nn.Sigmoid: 0.25, nn.Softplus: 1.0, nn.ELU: 1.0, nn.LeakyReLU: 1.0,
    nn.GELU: 1.1290, nn.SiLU: 1.0999, nn.Dropout: 1.0,
}  # fmt: skip
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def empirical_ratio(model: nn.Module, data: Any, site: str, kept: Bool[Tensor, " inputs"]) -> float:
    """sqrt(E |N(X) - N'(X)|² / Σ_c E |Y_c - Y'_c|²) when a layer loses the inputs that are not kept: what C is on data.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.eye_(net[0].weight), nn.init.constant_(net[1].weight, 3.0)
    >>> empirical_ratio(net, torch.eye(2), "0", torch.tensor([True, False]))
    3.0
    """
    model = plain_network(model)
    layers = layers_of(model, site)
    require(len(layers) == 1, f"site: {site!r} names {len(layers)} layers, expected one")
    name, layer = next(iter(layers.items()))
    weight = matrix(layer).double()
    require(
        kept.dtype == torch.bool and kept.shape == weight.shape[1:2],
        f"kept: got {show(kept)}, expected {weight.shape[1]} booleans",
    )
    inputs = Inputs(data)
    gram = moments(model, inputs, layers)[name]
    new = torch.where(kept.to(weight.device)[:, None], weight, 0)
    local = float(left_over(weight, new, gram.moment(False)[0]).sum()) * gram.places
    require(local > 0, "kept: the layer's output does not change")
    other = copy.deepcopy(model)
    masked = other.get_submodule(name)
    with torch.no_grad():
        weight_of(masked).copy_(unmatrixed(masked, new.to(weight_of(masked).dtype)))
    total, count = 0.0, 0
    for batch in inputs:
        batch = ready(batch, model)
        with frozen(model), frozen(other), torch.no_grad():
            gap = logits(called(model, batch)).double() - logits(called(other, batch)).double()
        total, count = total + float(gap.square().sum()), count + len(gap)
    return math.sqrt(total / count / local)


def worst_case_constant(
    model: nn.Module, example: Any, site: str, *, least_norms: dict[str, float] | None = None
) -> float:
    """A constant C with |N(X) - N'(X)| <= C |Y - Y'| for any change of a layer's output.

    Args:
        model: an ``nn.Sequential``, which may be nested, of linear steps, activations, batch and layer norms and max-pooling.
        example: inputs of the size that is meant; an operator's norm depends on it.
        least_norms: {layer or RMS norm: a lower bound of its centred input's norm}, as :func:`min_norm_probe` measures it; needed for those.

    Raises:
        InputError: another kind of network; attention, which has no global constant.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.constant_(net[2].weight, 3.0)
    >>> round(worst_case_constant(net, torch.ones(1, 2), "0"), 1)
    4.2
    """
    model = plain_network(model)
    layers_of(model, site)
    steps = _steps(model, "")
    names = [name for name, _ in steps]
    require(
        site in names,
        f"site: {site!r} is not a step of a plain chain; expected one of {', '.join(names[:6])}",
    )
    after = steps[names.index(site) + 1 :]
    seen: dict[str, Tensor] = {}
    taps = {f"{name}:in": (lambda x, name=name: seen.setdefault(name, x[:1].detach())) for name, _ in after}
    with frozen(model), torch.no_grad(), tap(model, {k: _silent(f) for k, f in taps.items()}):
        called(model, Inputs(example).first(model, 1))
    constant = 1.0
    for name, module in after:
        constant *= _constant(name, module, seen[name], least_norms or {})
    return constant


def min_norm_probe(model: nn.Module, data: Any) -> dict[str, float]:
    """The smallest norm of what each layer norm (centred) and RMS norm takes, over samples and tokens: 1 / r bounds its slope there.

    >>> min_norm_probe(nn.Sequential(nn.LayerNorm(2)), torch.tensor([[1.0, 3.0], [0.0, 4.0]]))
    {'0': 1.414...}
    """
    model = plain_network(model)
    norms = {n: m for n, m in model.named_modules() if _is_norm(m)}
    require(bool(norms), "model: it has no layer norm or RMS norm")
    least: dict[str, float] = {}

    def seen(name: str, centred: bool) -> Any:
        def see(x: Tensor) -> None:
            x = x.detach().double()
            x = x - x.mean(-1, keepdim=True) if centred else x
            least[name] = min(least.get(name, math.inf), float(x.norm(dim=-1).min()))

        return see

    functions = {f"{n}:in": seen(n, isinstance(m, nn.LayerNorm)) for n, m in norms.items()}
    for batch in Inputs(data):
        with frozen(model), torch.no_grad(), tap(model, functions):
            called(model, ready(batch, model))
    return least


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or type(module).__name__.endswith("RMSNorm")


def _silent(function: Any) -> Any:
    def see(x: Tensor) -> None:
        function(x)

    return see


def _steps(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        return [(name, model)]
    return [
        step
        for child, module in model.named_children()
        for step in _steps(module, f"{name}.{child}" if name else child)
    ]


def _constant(name: str, module: nn.Module, x: Tensor, least: dict[str, float]) -> float:
    if type(module) in _SLOPES:
        return _SLOPES[type(module)]
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        return float((scale if module.weight is None else scale * module.weight.detach().abs()).max())
    if _is_norm(module):
        require(
            least.get(name, 0) > 0,
            f"least_norms: {name!r} has no bound without the least norm of its input; measure it with min_norm_probe(model, data)",
        )
        weight: Any = getattr(module, "weight", None)
        width = x.shape[-1]
        largest = 1.0 if weight is None else float(weight.detach().abs().max())
        return largest * math.sqrt(width) / least[name]
    if isinstance(module, (nn.MaxPool2d, nn.MaxPool1d)):
        size, stride = module.kernel_size, module.stride or module.kernel_size
        pairs = zip(*(v if isinstance(v, tuple) else (v,) * (1 + (x.ndim == 4)) for v in (size, stride)))
        return math.sqrt(math.prod(math.ceil(k / s) for k, s in pairs))  # windows that one input can win
    if isinstance(module, _LINEAR):
        return _operator_norm(module, x)
    raise InputError(
        f"model: no Lipschitz constant is known for {name!r}, a {type(module).__name__}; attention has none, and sums of branches are not followed"
    )


def _operator_norm(module: nn.Module, x: Tensor, iterations: int = 100) -> float:
    """The largest singular value of a linear step on inputs of this size, by power iteration in float64, a little rounded up."""
    layer = copy.deepcopy(module).double()
    zero = torch.zeros_like(x, dtype=torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
    v, value = v / v.norm(), 0.0
    with torch.enable_grad():
        for _ in range(iterations):
            v = v.detach().requires_grad_()
            y = layer(v) - layer(zero).detach()
            value = float(y.detach().norm())
            if value == 0:
                return 0.0
            (back,) = torch.autograd.grad(y, v, y.detach())
            v = back / back.norm().clamp_min(1e-300)
    return value * (1 + 1e-3)
