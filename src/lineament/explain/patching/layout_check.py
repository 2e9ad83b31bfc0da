"""Is a model's layout what its names say? Heads against their projection's weights, and what blocks add against what their parts add.

Patching believes names: that these columns are one head, that this module's output is what attention adds. Both can be computed by hand: without a head
the projection returns less by W z, its columns times the head's values; and what a block adds to the residual stream is the sum of what its attention and
its MLP add. A layout that fails either is refused before anything is patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require, show
from lineament.core.models import called, frozen
from lineament.core.sites.activations import capture, patch
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.components import KINDS

# How far sums may be apart, as a share of their size: rounding of half precision, not another layout.
_TOLERANCE = 0.02


def check_layout(model: nn.Module, inputs: Any, layout: Mapping[str, str]) -> None:
    """Refuse a layout that the model's own numbers contradict.

    Args:
        inputs: what the model is called with, a batch of token ids.
        layout: the sites of each kind of :data:`~lineament.explain.patching.components.KINDS` in the order of the layers, as a glob, and under
            ``"blocks"`` the blocks. Heads (``z``) are held against the weights that read them; with ``blocks``, ``attn_out`` and ``mlp_out``
            their sum against what the block adds.

    Raises:
        InputError: an unknown kind, a glob without a site, another number of sites than blocks, and the first place where the numbers differ.

    >>> class Block(nn.Module):
    ...     def __init__(self): super().__init__(); self.mix, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x): x = x + self.mix(x); return x + self.mlp(x)
    >>> net, x = nn.Sequential(Block(), Block()), torch.ones(1, 3, 2)
    >>> check_layout(net, x, {"blocks": "*", "attn_out": "*.mix", "mlp_out": "*.mlp"})
    >>> check_layout(net, x, {"blocks": "*", "attn_out": "*.mlp", "mlp_out": "*.mlp"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: layout: what block '0' adds to the residual stream is not what '0.mlp' and '0.mlp' add to it ...
    """
    found: dict[str, list[Site]] = {}
    for kind, glob in layout.items():
        one_of("layout", kind, ("blocks", *KINDS))
        found[kind] = list(resolve(model, glob).values())
    blocks = found.get("blocks", [])
    for kind, sites in found.items():
        require(
            not blocks or len(sites) == len(blocks),
            f"layout: {kind!r} is {len(sites)} sites ({layout[kind]!r}) for {len(blocks)} blocks ({layout.get('blocks')!r}), expected one in each",
        )
    with frozen(model), torch.no_grad():
        for site in found.get("z", []):
            check_head(model, inputs, site)
        if {"blocks", "attn_out", "mlp_out"} <= found.keys():
            for block, attention, mlp in zip(blocks, found["attn_out"], found["mlp_out"]):
                _check_sum(model, inputs, block, (attention, mlp))


@torch.no_grad()
def check_head(model: nn.Module, inputs: Any, site: Site, head: int = 0) -> None:
    """Refuse a site of heads where, without one, the projection that reads them returns something else than its weights say.

    Raises:
        InputError: not heads, or the place where they differ.
    """
    view = site.view
    require(
        view is not None,
        f"layout: {site.name!r} is no site of heads, expected one such as 'layers.*.attention:z'",
    )
    assert view is not None
    weight = getattr(view.module, "weight", None)
    if view.side != "in" or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return  # the heads are what the block returns, or the weights are packed
    name = next(name for name, module in model.named_modules() if module is view.module)
    wanted, given = (name, f"{name}:in")
    with capture(model, [wanted, given]) as acts:
        called(model, inputs)
    z, before = acts[given], acts[wanted]
    columns = view.columns(z.device).unflatten(0, (-1, view.size))[head]

    def without(x: Tensor) -> Tensor:
        heads = view.read(x)
        heads = (
            torch.zeros_like(heads)
            if view.only is not None
            else heads.index_fill(-2, torch.tensor([head], device=x.device), 0)
        )
        return view.write(x, heads)

    with patch(model, {given: without}), capture(model, [wanted]) as acts:
        called(model, inputs)
    # Linear keeps (out, in); GPT-2's Conv1D (in, out).
    reads = weight[:, columns] if isinstance(view.module, nn.Linear) else weight[columns].T
    by_hand = z[..., columns].double() @ reads.double().T
    if not _alike(before - acts[wanted], by_hand):
        raise InputError(
            f"layout: without head {head} of {site.name!r}, {name!r} does not return what its weights say; its columns are not {view.heads} heads of {view.size}"
        )


def _check_sum(model: nn.Module, inputs: Any, block: Site, parts: tuple[Site, Site]) -> None:
    names = [f"{block.name}:in", block.name, *(part.name for part in parts)]
    with capture(model, names) as acts:
        called(model, inputs)
    start, end, *added = (acts[name] for name in names)
    shapes = {tuple(x.shape) for x in (start, end, *added)}
    require(
        len(shapes) == 1,
        f"layout: block {block.name!r} takes {show(start)}, and {names[2]!r} and {names[3]!r} add {show(added[0])} and {show(added[1])}, expected all alike",
    )
    total, whole = added[0].double() + added[1].double(), end.double() - start.double()
    share = float((whole - total).norm() / whole.norm().clamp_min(1e-12))
    require(
        _alike(whole, total),
        f"layout: what block {block.name!r} adds to the residual stream is not what {names[2]!r} and {names[3]!r} add to it (they are {100 * share:.0f} % of its size apart)",
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    apart, size = (
        (one.double() - other.double()).norm(),
        torch.maximum(one.double().norm(), other.double().norm()),
    )
    return float(apart) <= _TOLERANCE * float(size) + 1e-9
