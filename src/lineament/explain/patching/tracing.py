"""The parts of a block whose architecture is not known, found by what passes in it: x_out = x_in + mixer + MLP.

One forward of a few tokens shows every module's output in the first block. The modules whose outputs add up to what the block adds to the residual
stream are its parts; the one whose output at a position changes with earlier tokens mixes positions (attention, or a state-space mixer).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.core.models import device_of, frozen, unwrapped
from lineament.core.sites.heads import head_view
from lineament.core.sites.hooks import tap
from lineament.core.sites.naming import Site

# What one part is called in :mod:`lineament.explain.patching.components`, by the name within a block.
Names = dict[str, Any]


def traced(model: nn.Module) -> tuple[str, list[Site], Names, bool]:
    """The name of the blocks, the blocks, the names of their parts, and whether attention and MLP both read the stream before the block.

    Raises:
        InputError: no row of blocks, or outputs that do not add up to the residual stream.
    """
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    prefix, blocks = _blocks(inner, config)
    first, later = (_outputs(inner, prefix, ids) for ids in _ids(inner))
    stream, output = first.pop("in"), first.pop("")
    added = output - stream
    level = float(added.abs().max()) * (1e-4 if added.dtype in (torch.float32, torch.float64) else 3e-2)
    block = inner.get_submodule(f"{prefix}.0")
    whole = {
        name: value.reshape(added.shape)
        for name, value in first.items()
        # Dropout and the like hand on what another module made, and may run several times.
        if value.numel() == added.numel() and any(True for _ in block.get_submodule(name).parameters())
    }
    outermost = sorted(whole, key=lambda name: (name.count("."), list(whole).index(name)))
    for count in (1, 2):
        for parts in combinations(outermost, count):
            gap = added - sum(whole[part] for part in parts)
            if float(gap.abs().max()) <= level:
                names, parallel = _named(block, parts, first, later, config)
                if _consistent(names):
                    return prefix, blocks, names | {"blocks": prefix}, parallel
    raise _unknown(inner, "no two modules of a block give what it adds to the residual stream")


def _consistent(names: Names) -> bool:
    """Whether the module that mixes positions and the one with the heads are the same, or one is in the other."""
    mixer, heads = names["attn_out"], names.get("attention", names["attn_out"])
    return f"{mixer}.".startswith(f"{heads}.") or f"{heads}.".startswith(f"{mixer}.")


def _blocks(inner: Any, config: Any) -> tuple[str, list[Site]]:
    count = getattr(config, "num_hidden_layers", None)
    for name, row in inner.named_modules():
        alike = (
            isinstance(row, nn.ModuleList)
            and len(row) == count
            and len({type(unwrapped(b)) for b in row}) == 1
        )
        if alike and any(p.ndim > 1 for p in row.parameters()):
            return name, [Site(f"{name}.{k}", unwrapped(block)) for k, block in enumerate(row)]
    raise _unknown(inner, f"it has no row of {count} blocks")


def _unknown(inner: Any, why: str) -> InputError:
    kind = getattr(getattr(inner, "config", None), "model_type", None) or type(inner).__name__
    return InputError(
        f"model: the parts of {kind!r} are not known and could not be found ({why}); name the sites, "
        "sites={'blocks': 'layers.*', 'resid_pre': 'layers.*:in', 'attn_out': 'layers.*.attention'}"
    )


def _ids(inner: Any) -> tuple[Tensor, Tensor]:
    """Two prompts of a few tokens, and the same with other first tokens."""
    size = inner.get_input_embeddings().num_embeddings
    ids = (torch.arange(10, device=device_of(inner)).reshape(2, 5) * 7 + 3) % size
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 5) % size
    return ids, other


def _outputs(inner: Any, prefix: str, ids: Tensor) -> dict[str, Tensor]:
    """What every module of the first block returns, by its name within the block, in the order of their calls; ``in``: what the block takes."""
    seen: dict[str, Tensor] = {}
    block = inner.get_submodule(f"{prefix}.0")
    sites = {
        name: Site(f"{prefix}.0.{name}".rstrip("."), unwrapped(module))
        for name, module in block.named_modules()
    }
    sites["in"] = sites[""].input

    def keep(name: str) -> Any:
        def see(tensor: Tensor) -> None:
            seen.setdefault(name, tensor.detach().clone())

        return see

    with frozen(inner), torch.no_grad(), tap(inner, {site: keep(name) for name, site in sites.items()}):
        inner(input_ids=ids)
    return seen


def _named(
    block: nn.Module, parts: tuple[str, ...], first: dict[str, Tensor], later: dict[str, Tensor], config: Any
) -> tuple[Names, bool]:
    def mixes(name: str) -> bool:
        own, other = (found[name].reshape(2, 5, -1)[:, 1:] for found in (first, later))
        return not torch.equal(own, other)

    order = list(first)
    # Where the MLP reads what attention added, both change with earlier tokens; attention comes first.
    mixer, *rest = sorted(parts, key=lambda name: (not mixes(name), order.index(name)))
    names: Names = {"flattened": [part for part in parts if first[part].ndim == 2]}
    names["attn_out"] = mixer
    attention = [name for name, m in block.named_modules() if name and head_view(m, "z", config) is not None]
    if attention:
        names["attention"] = attention[-1]
    for part in rest:
        names["mlp_out"] = part
        inside = [name for name in order if name == part or name.startswith(f"{part}.")]
        linear = [
            n
            for n in inside
            if hasattr(block.get_submodule(n), "weight")
            and torch.equal(first[n].flatten(), first[part].flatten())
        ]
        names |= {"neurons": f"{linear[-1]}:in"} if linear else {}
    return names, bool(rest) and not mixes(rest[0])
