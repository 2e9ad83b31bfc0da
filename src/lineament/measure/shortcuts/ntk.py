"""What does an infinitely wide network do with two latents? Kernels of one hidden ReLU layer, kernel ridge, and a finite network's own kernel.

Hermann, Mobahi, Fel, Mozer (arXiv 2310.16228) explain the bias to what is available by the neural tangent kernel. Without biases, with f = √(2/m) Σ v relu(w·x),

    NTK(x, x') = |x||x'| h(u),  h(u) = (2u(π - arccos u) + √(1 - u²))/π,     NNGP(x, x') = |x||x'| (u(π - arccos u) + √(1 - u²))/π,

u the cosine. A linear network's least squares does not depend on the amplification; ridge and early stopping do, so kernels are compared at the same relative ridge.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lineament.core import checks
from lineament.core.models import frozen, logits

Kernel = Callable[[Tensor, Tensor], Tensor]


def linear_kernel(x: Float[Tensor, "n dims"], other: Float[Tensor, "m dims"]) -> Float[Tensor, "n m"]:
    """x · x', the kernel of a linear network.

    >>> linear_kernel(torch.eye(2), torch.ones(1, 2)).tolist()
    [[1.0], [1.0]]
    """
    return x @ other.T


def relu_ntk(x: Float[Tensor, "n dims"], other: Float[Tensor, "m dims"]) -> Float[Tensor, "n m"]:
    """The neural tangent kernel of one infinitely wide hidden ReLU layer; 0 where an input is 0.

    >>> relu_ntk(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).mul(torch.pi).tolist()[0][1]
    1.0
    """
    return _angular(x, other, _ntk)


def relu_nngp(x: Float[Tensor, "n dims"], other: Float[Tensor, "m dims"]) -> Float[Tensor, "n m"]:
    """The covariance of such a layer's outputs before training (its arc-cosine kernel), where only the head would be trained.

    >>> relu_nngp(torch.ones(1, 4), torch.ones(1, 4)).item()
    4.0
    """
    return _angular(x, other, _nngp)


def relu_ntk_profile(u: Tensor) -> Tensor:
    """h(u) of :func:`relu_ntk`, of the cosine u: 0 at -1, 1/π at 0, 2 at 1.

    >>> relu_ntk_profile(torch.tensor([-1.0, 1.0])).tolist()
    [0.0, 2.0]
    """
    return torch.from_numpy(_ntk(u.double().numpy())).to(u)


KERNELS: dict[str, Kernel] = {"linear": linear_kernel, "relu_ntk": relu_ntk, "relu_nngp": relu_nngp}


def kernel_ridge(
    x: Float[Tensor, "n dims"],
    targets: Float[Tensor, "n"],
    kernel: str | Kernel = "relu_ntk",
    *,
    ridge: float = 1e-2,
) -> Callable[[Float[Tensor, "m dims"]], Float[Tensor, "m"]]:
    """The function that kernel ridge regression learns: K(·, x) (K + r tr(K)/n I)⁻¹ y.

    Args:
        x, targets: the training data; at most a few thousand, since K is n x n.
        kernel: ``"linear"``, ``"relu_ntk"``, ``"relu_nngp"``, or a function of two batches.
        ridge: r, relative to the kernel's mean diagonal, so that kernels of any scale are compared alike. At r far below 0.01 the ReLU kernels
            interpolate the labels' noise, and their bias says nothing of availability.

    Raises:
        InputError: an unknown kernel, shapes that do not fit, a ridge that leaves the system singular.

    >>> x = torch.tensor([[1.0], [-1.0], [2.0]]); f = kernel_ridge(x, x[:, 0], "linear", ridge=0.0001)
    >>> round(f(torch.tensor([[3.0]])).item(), 2)
    3.0
    """
    checks.tensor("x", x, shape=("n", "dims"), floating=True)
    checks.tensor("targets", targets, shape=(len(x),))
    checks.number("ridge", ridge, low=0, open_low=True)
    if isinstance(kernel, str):
        kernel = KERNELS[checks.one_of("kernel", kernel, KERNELS)]
    x = x.double()
    gram = kernel(x, x)
    gram = gram + ridge * gram.trace() / len(x) * torch.eye(len(x), dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(gram)
    checks.require(
        not int(failed), f"ridge: got {ridge:g}, with which the kernel is singular in float64; raise it"
    )
    weights = torch.cholesky_solve(targets.double()[:, None], factor)[:, 0]
    return lambda other: kernel(other.double(), x) @ weights


def empirical_ntk(
    model: nn.Module,
    x: Tensor,
    other: Tensor | None = None,
    *,
    output: int = 0,
    memory: int = 2**26,
) -> Float[Tensor, "n m"]:
    """The tangent kernel of a network as it is: the products of its output's gradients with respect to all weights, ⟨∇f(x), ∇f(x')⟩.

    The Jacobian is made for a few weights at a time (``memory`` numbers at most), never whole.

    Args:
        x, other: inputs as the network takes them; ``other`` is ``x`` by default.
        output: which output.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> empirical_ntk(net, torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    checks.number("output", output, low=0, integer=True)
    both = x if other is None else torch.cat([x, other])
    found = torch.zeros(len(both), len(both), dtype=torch.float64)
    with frozen(model):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        for name, weight in weights.items():

            def answer(value: Tensor, row: Tensor, name: str = name) -> Tensor:
                return logits(functional_call(model, {**weights, name: value}, (row[None],)))[0, output]

            # The gradients of all inputs, for as many inputs at a time as fit beside those of all the others.
            rows = max(1, memory // max(weight.numel(), 1))
            slope = vmap(jacrev(answer), in_dims=(None, 0), randomness="same")
            parts = both.split(rows)
            for i, left in enumerate(parts):
                G = slope(weight, left).flatten(1).double()
                for j in range(i, len(parts)):
                    H = G if i == j else slope(weight, parts[j]).flatten(1).double()
                    block = G @ H.T
                    at = slice(i * rows, i * rows + len(G)), slice(j * rows, j * rows + len(H))
                    found[at] += block
                    if i != j:
                        found[at[1], at[0]] += block.T
    return found if other is None else found[: len(x), len(x) :]


def availability_sign(scales: tuple[float, float], means: tuple[float, float]) -> int:
    """Which of two latents a wide two-layer ReLU network is the more sensitive to: 1 the first, -1 the second, 0 neither.

    The sign of (a₁²μ₁² - a₂²μ₂²)|a₁ - a₂|, the first difference (of ninth derivatives) that the paper finds. *Unverified*: the paper states no measure
    for the alignment that is differentiated. It prints (a₁ - a₂), which stays the same when the two latents are exchanged and so can only be meant
    for a₁ ≥ a₂.

    Args:
        scales: a, of either latent's amplification.
        means: μ, from their predictivities.

    >>> availability_sign((2.0, 1.0), (1.0, 1.0)), availability_sign((2.0, 1.0), (0.1, 1.0))
    (1, -1)
    """
    (a, b), (m, n) = scales, means
    value = ((a * m) ** 2 - (b * n) ** 2) * abs(a - b)
    return (value > 0) - (value < 0)


def _angular(x: Tensor, other: Tensor, profile: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """|x||x'| times a function of the cosine, in NumPy's float64: near cosine 1 the arccosine turns one rounding into 5e-9, and reference numbers hold NumPy's."""
    a = x.detach().double().cpu().numpy()
    b = a if other is x else other.detach().double().cpu().numpy()
    norms = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    u = np.divide(a @ b.T, norms, out=np.zeros_like(norms), where=norms > 0)
    return torch.from_numpy(norms * profile(u.clip(-1, 1))).to(x)


def _ntk(u: np.ndarray) -> np.ndarray:
    return (2 * u * (np.pi - np.arccos(u)) + np.sqrt(1 - u * u)) / np.pi


def _nngp(u: np.ndarray) -> np.ndarray:
    return (np.sqrt(1 - u * u) + u * (np.pi - np.arccos(u))) / np.pi
