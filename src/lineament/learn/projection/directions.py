"""How strongly each layer of any network weighs given directions of the input: the generalisation of a linear network's feature weights.

Xue et al., ICLR 2024, arXiv 2403.11391, weigh feature i of a linear network by ‖W_l ... W_1 v_i‖. Of any other network it is the mean over inputs x of ‖J_l(x) v_i‖,
by forward differentiation: no Jacobian is formed, and one pass serves all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, frozen
from lineament.core.sites.hooks import eagerly, tap
from lineament.core.sites.naming import resolve
from lineament.learn.projection.pooling import pooled


def direction_weights(
    model: nn.Module,
    inputs: Tensor,
    directions: Tensor,
    *,
    sites: str | Sequence[str] = "*",
    batch_size: int | str = "auto",
) -> dict[str, Tensor]:
    """The mean of ‖J(x) v‖ over inputs x for each direction v: {site: [directions]}, in eval mode.

    J(x) is the Jacobian of what passes at the site, averaged over positions; of a linear network the norm of its matrix times v.

    Args:
        inputs: [n, ...] floating-point numbers.
        directions: [k, ...] of a sample's shape each, taken at the length they have: give unit vectors for weights that can be compared.
        sites: names or globs; by default the model's children.

    Raises:
        InputError: unknown sites, directions of another shape than a sample, whole numbers, or an operation without a forward derivative (named).

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> direction_weights(net, torch.randn(4, 2), torch.eye(2))["0"].tolist()
    [5.0, 1.0]
    """
    require(
        isinstance(inputs, Tensor) and inputs.is_floating_point() and len(inputs) > 0,
        f"inputs: got {show(inputs)}, expected floating-point samples, along which a network can be differentiated",
    )
    require(
        isinstance(directions, Tensor)
        and directions.is_floating_point()
        and len(directions) > 0
        and directions.shape[1:] == inputs.shape[1:],
        f"directions: got {show(directions)}, expected [directions, {', '.join(map(str, inputs.shape[1:]))}] real numbers",
    )
    device = device_of(model)

    def sums(start: int, stop: int) -> dict[str, Tensor]:
        part = inputs[start:stop].to(device)
        each = [_tangents(model, part, v.to(part).expand_as(part), sites) for v in directions]
        return {site: torch.stack([found[site] for found in each]) for site in each[0]}

    total: dict[str, Tensor] = {}
    for found in auto_batch(sums, len(inputs), batch_size=batch_size, memory=model, most=256):
        total = {site: total[site] + value for site, value in found.items()} if total else found
    return {site: value / len(inputs) for site, value in total.items()}


def _tangents(model: nn.Module, x: Tensor, v: Tensor, sites: str | Sequence[str]) -> dict[str, Tensor]:
    """The sum over a batch of the tangents' norms at each site, in float64."""
    places = resolve(model, sites)
    found: dict[str, Tensor] = {}

    def norms(name: str, value: Tensor) -> None:
        require(
            name not in found,
            f"site {name!r} was reached several times in this forward, so that it has no one tensor",
        )
        tangent = forward_ad.unpack_dual(pooled(value)).tangent
        found[name] = (
            torch.zeros((), dtype=torch.float64, device=x.device)
            if tangent is None
            else tangent.double().norm(dim=1).sum()
        )

    # Fused attention has no forward derivative.
    with (
        frozen(model, requires_grad=None),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        eagerly(),
        tap(model, {place: partial(norms, name) for name, place in places.items()}),
        forward_ad.dual_level(),
    ):
        try:
            _called(model, forward_ad.make_dual(x, v), found)
        except NotImplementedError as error:
            raise InputError(f"directions: {str(error).splitlines()[0]}") from None
    missed = next((name for name in places if name not in found), None)
    require(missed is None, f"site {missed!r} was not reached in this forward")
    return {name: found[name] for name in places}


def _called(model: nn.Module, x: Tensor, found: dict[str, Tensor]) -> None:
    """One forward; where a fused recurrent layer has no forward derivative, another by the operations that it is made of."""
    try:
        model(x)
    except NotImplementedError:
        found.clear()
        with warnings.catch_warnings(), torch.backends.cudnn.flags(enabled=False):
            warnings.filterwarnings("ignore", "TF32")  # what setting the flags says of Intel's GPUs
            with torch.backends.mkldnn.flags(enabled=False):
                model(x)
