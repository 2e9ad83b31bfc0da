"""What TransformerLens takes out of the heads' mixed values when it folds their bias into the output (``fold_value_biases``).

Attention weights sum to one, so that what every token's value has in common comes out of the mixing as it went in: the bias of the value projection, and with
``fold_ln`` what the projection makes of the bias of the norm before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.core.models import unwrapped


@torch.no_grad()
def value_bias(model: nn.Module, site: str, *, with_norm: bool) -> Tensor:
    """(d): the common part of the mixed values at a site such as ``"transformer.h.3.attn.c_proj:in"``.

    Raises:
        InputError: an attention whose value projection is not known here.

    >>> block = nn.ModuleDict({"attn": nn.ModuleDict({"v_proj": nn.Linear(2, 2), "o_proj": nn.Linear(2, 2)})})
    >>> bool((value_bias(nn.ModuleList([block]), "0.attn.o_proj:in", with_norm=False) == block["attn"]["v_proj"].bias).all())
    True
    """
    attention, _, _ = site.partition(":")[0].rpartition(".")
    block, _, _ = attention.rpartition(".")
    modules = dict(unwrapped(model).named_modules())
    known: Any = modules.get(attention)
    joint, alone = getattr(known, "c_attn", None), getattr(known, "v_proj", None)
    projection: Any = joint if joint is not None else alone
    if projection is None:
        raise InputError(
            f"site: {site!r} is behind an attention ({type(known).__name__}) whose value projection is not known here; expected one with c_attn or v_proj"
        )
    norms = (getattr(modules.get(block), name, None) for name in ("ln_1", "input_layernorm", "self_attn_layer_norm"))  # fmt: skip
    norm: Any = next((each for each in norms if each is not None), None)
    weight = projection.weight
    width = (
        weight.shape[0] if joint is not None and weight.shape[1] == 3 * weight.shape[0] else weight.shape[1]
    )
    given = weight.new_zeros(1, width)
    if with_norm and getattr(norm, "bias", None) is not None:
        given = norm.bias[None]
    common = projection(given)[0]
    return common[-width:] if joint is not None else common
