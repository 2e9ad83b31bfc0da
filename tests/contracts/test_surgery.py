"""What surgery keeps on every family of networks: permuted equals original, removed equals masked, and the network stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lineament.core.checks import InputError
from lineament.core.models import called
from lineament.core.surgery import channel_groups, load, permute, remove, save
from lineament.core.surgery.tracing import KeepsDouble
from tests.contracts.surgery_networks import FAMILIES, GROUPS, made
from tests.contracts.unchanged import unchanged

# Groups whose number of channels is written in a module's code: they can be reordered, but not narrowed.
FIXED = {("encoder", "1.layers.0.self_attn"), ("encoder", "1.layers.1.self_attn"), ("zero_padded", "conv")}


def answer(model: nn.Module, example) -> Tensor:
    example = tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    with torch.no_grad(), KeepsDouble():
        output = called(model.eval(), example)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_found_and_can_be_permuted(family):
    net, example = made(family)
    with unchanged(net):
        groups = channel_groups(net, example)
    assert (len(groups), sum(g.heads for g in groups.values())) == GROUPS[family], (
        list(groups),
        groups.whole,
    )
    assert not any("permuting it changes" in why for why in groups.whole.values())
    net = net.double()
    before = answer(net, example)
    orders = {g: torch.randperm(g.size) for g in groups.values()}
    with unchanged(net):
        other = permute(net, orders)
    assert type(other) is type(net)
    assert (answer(other, example) - before).abs().max() <= 1e-9 * before.abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_equals_masked(family, tmp_path):
    net, example = made(family)
    groups = [g for g in channel_groups(net, example).values() if not g.statistics]
    whole = copy.deepcopy(net).double()
    assert groups or family == "normalised_weights"  # whose norms are over the channels
    for group in groups:
        if (family, group.name) in FIXED:
            with pytest.raises(InputError, match=r"does not run|cannot have fewer"):
                remove(net, {group: [0]}, example=example)
            continue
        gone = [0] if group.size < 4 else [0, 2]
        masked = copy.deepcopy(whole)
        parameters = dict(masked.named_parameters())
        with torch.no_grad():
            for e in group.having("read", "both"):
                parameters[e.parameter].index_fill_(e.axis, e.slots[gone].reshape(-1), 0)
        small = remove(
            whole,
            {group: gone},
            example=tree_map(lambda t: t.double() if t.is_floating_point() else t, example),
        )
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
        expected = answer(masked, example)
        assert (expected - answer(whole, example)).abs().max() > 0
        assert torch.allclose(answer(small, example), expected, rtol=0, atol=1e-12)
    if not groups:
        return
    again = load(save(small, tmp_path), lambda: made(family, seed=1)[0].double())
    assert torch.equal(answer(again, example), answer(small, example))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_query_heads_that_share_a_key_change_among_themselves(family, tmp_path):
    net, example = made(family)
    groups = [g for g in channel_groups(net, example).values() if g.heads]
    assert [(g.size, [w.size for w in g.within]) for g in groups] == [(3, [2, 2, 2])] * 2
    whole = copy.deepcopy(net).double()
    before = answer(whole, example)
    inside = [heads for g in groups for heads in g.within]
    turned = permute(whole, {heads: [1, 0] for heads in inside})
    assert (answer(turned, example) - before).abs().max() <= 1e-9 * before.abs().max()
    assert not torch.equal(
        turned.model.layers[0].self_attn.q_proj.weight, whole.model.layers[0].self_attn.q_proj.weight
    )

    masked = copy.deepcopy(whole)
    gone = {heads: [k % 2] for k, heads in enumerate(inside)}
    with torch.no_grad():
        for heads, (one,) in gone.items():
            for e in heads.having("read"):
                dict(masked.named_parameters())[e.parameter].index_fill_(e.axis, e.slots[one], 0)
    small = remove(whole, gone, example=example)
    assert small.config.num_attention_heads == small.config.num_key_value_heads == 3
    assert small.config.head_dim == 4
    assert torch.allclose(answer(small, example), answer(masked, example), rtol=0, atol=1e-12)
    again = load(save(small, tmp_path), lambda: made(family, seed=1)[0].double())
    assert torch.equal(answer(again, example), answer(small, example))
    with pytest.raises(InputError, match="the same number for each of the 3 keys"):
        remove(whole, {inside[0]: [0]})
    with pytest.raises(InputError, match="change one after the other"):
        permute(whole, {groups[0]: [2, 1, 0], inside[0]: [1, 0]})


@pytest.mark.parametrize("family", ["gpt2", "vit", "resnet"])
def test_heads_with_a_key_of_their_own_have_none_within(family):
    net, example = made(family)
    assert all(not g.within and not g.keys for g in channel_groups(net, example).values())
