"""A layout is held against the model's own numbers: heads of every family, and what the parts of a block add."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import FAMILIES, prompts, tiny
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.families import blocks_of
from lineament.core.sites.naming import resolve
from lineament.explain.patching.components import architecture
from lineament.explain.patching.layout_check import check_head, check_layout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layouts_of_known_families_are_right(family):
    """Each head of each block, and the sum of what attention and MLP add."""
    model, (ids, _) = tiny(family), prompts()
    known = architecture(model)
    block = known.blocks[0].name.rpartition(".")[0] + ".*"
    layout = {"blocks": block, "z": f"{block}.{known.names['attention']}:z"}
    layout |= {kind: f"{block}.{known.names[kind]}" for kind in ("attn_out", "mlp_out")}
    check_layout(model, {"input_ids": ids}, layout)
    for site in resolve(model, layout["z"]).values():
        for head in range(site.view.heads):
            check_head(model, {"input_ids": ids}, site, head)
    wrong = {**layout, "mlp_out": layout["attn_out"]}
    with pytest.raises(InputError, match=r"what block '.*0' adds to the residual stream is not what"):
        check_layout(model, {"input_ids": ids}, wrong)
    assert blocks_of(model) is not None


class Scaled(nn.Linear):
    """A projection that does not do what its weight says."""

    def forward(self, x):
        return super().forward(x.flip(-1))


def test_heads_that_the_weights_contradict_are_refused_with_the_place():
    model, (ids, _) = tiny("llama"), prompts()
    attention = model.model.layers[1].self_attn
    other = Scaled(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    other.weight = attention.o_proj.weight
    attention.o_proj = other
    with pytest.raises(
        InputError,
        match=r"without head 0 of 'model.layers.1.self_attn:z', 'model.layers.1.self_attn.o_proj' does not return",
    ):
        check_layout(model, {"input_ids": ids}, {"z": "model.layers.*.self_attn:z"})
    assert not any(module._forward_hooks for module in model.modules())


REFUSED = {
    "kind": ({"heads": "model.layers.*"}, "layout: .*'heads'"),
    "glob": ({"attn_out": "model.layers.*.attention"}, "attention"),
    "number": (
        {"blocks": "model.layers.*", "mlp_out": "model.layers.1.mlp"},
        "'mlp_out' is 1 sites .* for 2 blocks",
    ),
    "no heads": ({"z": "model.layers.*.mlp"}, "is no site of heads"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layouts_that_cannot_be_are_refused(kind):
    with pytest.raises(InputError, match=REFUSED[kind][1]):
        check_layout(tiny("llama"), {"input_ids": torch.ones(1, 4, dtype=torch.long)}, REFUSED[kind][0])
