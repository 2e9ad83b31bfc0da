"""Merging channels: exact where channels are equal, the closed error of one merge, budgets, heads, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.surgery_networks import Block, gpt2, llama, made
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.models import called
from lineament.core.surgery import channel_groups, fold_norms, load, permute, save
from lineament.measure import (
    equivalence_error,
    feature_complexity,
    merge,
    merge_as_published,
    repair,
    swap_test,
)
from lineament.measure.merging.plan import prepare


def mlp(*widths: int, seed: int = 0, act=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def duplicate(layer: nn.Module, *rows: int) -> None:
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[list(rows[1:])] = tensor[rows[0]].clone()


X = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", ["mean_sum", "sum_mean"])
@pytest.mark.parametrize("same_outside", [True, False])
def test_duplicates_merge_exactly_whatever_reads_them(rule, same_outside):
    net = mlp(6, 7, 3)
    duplicate(net[0], 1, 3)
    if same_outside:
        with torch.no_grad():
            net[2].weight[:, 3] = net[2].weight[:, 1]
    found = merge(net, example=X, beta=0.0, rule=rule, distance="in")
    assert found.sizes["0"] == (7, 6) and found.groups["0"].tolist() == [0, 5, 1, 5, 2, 3, 4]
    assert torch.allclose(found.model(X), net(X), rtol=0, atol=1e-12)


def test_equal_weights_with_other_biases_are_other_channels():
    net = mlp(6, 5, 3)
    with torch.no_grad():
        net[0].weight[2], net[2].weight[:, 2] = net[0].weight[1].clone(), net[2].weight[:, 1].clone()
        net[0].bias[1], net[0].bias[2] = 0.0, 2.0
    assert merge(net, example=X, beta=0.0).sizes["0"] == (5, 5)
    assert merge_as_published(net, example=X, beta=0.0).sizes["0"] == (5, 4)


@pytest.mark.parametrize("rule", ["mean_sum", "sum_mean"])
def test_one_merge_errs_by_half_the_product_of_the_differences(rule):
    net = mlp(6, 4, 3)
    x = X.abs()
    with torch.no_grad():
        net[0].weight.abs_(), net[0].bias.abs_()  # every unit is in its linear part
    found = merge(net, example=x, keep={"0": 3}, rule=rule)
    i, j = torch.nonzero(found.groups["0"] == 2).flatten().tolist()
    z, v = net[0](x), net[2].weight
    expected = 0.5 * (z[:, i] - z[:, j])[:, None] * (v[:, i] - v[:, j])
    assert torch.allclose(net(x) - found.model(x), expected, rtol=0, atol=1e-12)


def test_both_rules_are_one_function_for_a_first_merge():
    net = mlp(6, 8, 3)
    a, b = (
        merge(net, example=X, keep={"0": 7}, rule=rule, distance="paper").model(X)
        for rule in ("mean_sum", "sum_mean")
    )
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(3, 9), min_size=2, max_size=3),
    st.integers(0, 5),
    st.sampled_from(["mean_sum", "sum_mean"]),
    st.sampled_from(["all", "paper", "cosine", "in"]),
)
def test_what_is_kept_up_to_date_is_what_is_computed_anew(widths, seed, rule, distance):
    plan = prepare(
        mlp(4, *widths, 3, seed=seed),
        X[:, :4],
        None,
        rule=rule,
        norms="fold",
        distance=distance,
        rescale=False,
    )
    for _ in range(3):
        for name, channels in plan.channels.items():
            if len(channels) < 3:
                continue
            i, j, distance_, far = channels.closest()
            rows = [
                torch.cat([channels.weights.rows(e, [int(f)])[0] for e in (*channels.makes, *channels.reads)])
                for f in channels.first[: len(channels)]
            ]
            rows = torch.stack(rows)
            rows = rows / rows.norm(dim=1, keepdim=True) if distance == "cosine" else rows
            truth = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
            assert torch.allclose(torch.from_numpy(channels.matrix()), truth, atol=1e-10)
            assert far == pytest.approx(float(truth.max()), abs=1e-10)
            off = truth + torch.eye(len(truth)) * 1e9
            assert (
                distance_
                == pytest.approx(float(off.min()), abs=1e-12)
                == pytest.approx(float(off[i, j]), abs=1e-12)
            )
            plan.merge(name, i, j, 0.0)


def test_groups_are_partitions_and_parameters_follow_from_sizes():
    net = mlp(6, 9, 8, 3)
    found = merge(net, example=X, beta=0.6)
    (_, a), (_, b) = found.sizes["0"], found.sizes["2"]
    assert found.parameters[1] == 7 * a + (a + 1) * b + (b + 1) * 3
    for name, (before, after) in found.sizes.items():
        assert (
            found.groups[name].unique().tolist() == list(range(after)) and len(found.groups[name]) == before
        )
        assert len(found.trace[name]) == before - after and (found.trace[name] <= 0.6).all()
    assert found.flops[1] == 2 * 50 * (6 * a + a * b + b * 3)


def test_merging_commutes_with_a_permutation():
    net = mlp(6, 9, 3)
    group = channel_groups(net, X)["0"]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    a, b = merge(net, example=X, beta=0.5), merge(permute(net, {group: order}), example=X, beta=0.5)
    assert a.sizes == b.sizes and a.sizes["0"][1] < 9
    assert torch.allclose(a.model(X), b.model(X), atol=1e-10)


def test_nothing_merges_at_ratio_zero_and_more_at_a_larger_beta():
    net = mlp(6, 12, 3)
    assert merge_as_published(net, example=X, beta=0.9, max_ratio=0.0).sizes["0"] == (12, 12)
    left = [merge(net, example=X, beta=beta).sizes["0"][1] for beta in (0.0, 0.1, 0.3, 0.5, 0.9)]
    assert left == sorted(left, reverse=True) and left[0] == 12 > left[-1]
    curve = feature_complexity(net, (0.0, 0.1, 0.3, 0.5, 0.9), example=X)
    assert curve.sizes["0"].tolist() == left and curve.area["0"] == pytest.approx(sum(left) / 60)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 6), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 4)
    )  # fmt: skip
    for t in net.state_dict().values():
        if t.is_floating_point():
            t.copy_(t + 0.2 * torch.rand_like(t))
    return net.eval().double()


IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_folding_is_exact_and_duplicates_behind_norms_merge_exactly_only_then():
    net = conv_net()
    block = net[3]
    with torch.no_grad():
        for t in (block.conv1.weight, *(v for v in block.bn1.state_dict().values() if v.ndim)):
            t[4] = t[2]
    with unchanged(net):
        folded, pairs = fold_norms(net, IMAGES)
    assert set(pairs) == {"1", "3.bn1", "3.bn2"} and torch.allclose(folded(IMAGES), net(IMAGES), atol=1e-10)
    wrong = {
        norms: float(
            (
                merge(
                    net, example=IMAGES, sites="3.conv1", beta=0.0, norms=norms, rule=rule, distance="in"
                ).model(IMAGES)
                - net(IMAGES)
            )
            .abs()
            .max()
        )
        for norms, rule in (("fold", "mean_sum"), ("sigma", "sum_mean"), ("paper", "sum_mean"))
    }
    assert wrong["fold"] < 1e-12 and wrong["sigma"] < 1e-4 < 1e-2 < wrong["paper"]


def test_a_norm_that_follows_two_readers_is_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(8, 2)
            self.norm.running_mean.fill_(0.5)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.cat([torch.relu(self.norm(h)), torch.relu(h)], 1))

    net = Net().eval()
    assert fold_norms(net, torch.randn(5, 3))[1] == {}
    assert "norm" in merge(net, example=torch.randn(5, 3)).whole["a"]


def test_a_gated_mlp_merges_duplicates_by_means_and_refuses_sums():
    net, batch = made("llama")
    net = net.double()
    layer = net.model.layers[0].mlp
    for part in (layer.gate_proj, layer.up_proj):
        part.weight.data[5] = part.weight.data[2]
    name = "model.layers.0.mlp.gate_proj"
    found = merge(net, example=batch, sites=name, beta=0.0, distance="in")
    assert found.sizes[name] == (14, 13)
    with torch.no_grad():
        assert torch.allclose(found.model(**batch).logits, net(**batch).logits, atol=1e-10)
    with pytest.raises(InputError, match="squares"):
        merge(net, example=batch, sites=name, rule="sum_mean")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equal_heads_merge_exactly_however_they_are_written(family):
    torch.manual_seed(0)
    if family == "gpt2":
        net, batch = gpt2()
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=30,
            hidden_size=24,
            intermediate_size=14,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
        net, batch = LlamaForCausalLM(config), llama()[1]
    net = net.double().eval()
    if family == "gpt2":
        attention = net.transformer.h[0].attn
        w, b, o = attention.c_attn.weight.data, attention.c_attn.bias.data, attention.c_proj.weight.data
        turn, other = (
            torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0],
            torch.randn(4, 4, dtype=torch.float64),
        )
        for start, matrix in ((0, turn), (12, torch.linalg.inv(turn).T), (24, other)):
            w[:, start + 8 : start + 12] = w[:, start : start + 4] @ matrix
            b[start + 8 : start + 12] = b[start : start + 4] @ matrix
        o[8:12] = torch.linalg.inv(other) @ o[0:4]
        name = "transformer.h.0.attn.c_attn"
    else:
        attention = net.model.layers[0].self_attn
        a = torch.randn(4, dtype=torch.float64)
        for part, phase in (
            (attention.q_proj, 1),
            (attention.k_proj, 1),
        ):  # a rotation within each frequency pair
            z = (
                torch.complex(part.weight.data[0:4], part.weight.data[4:8])
                * torch.polar(torch.ones_like(a), phase * a)[:, None]
            )
            part.weight.data[16:20], part.weight.data[20:24] = z.real, z.imag
        attention.v_proj.weight.data[16:24] = attention.v_proj.weight.data[0:8]
        attention.o_proj.weight.data[:, 16:24] = attention.o_proj.weight.data[:, 0:8]
        name = "model.layers.0.self_attn.q_proj"
    found = merge(net, example=batch, sites=name, keep={name: 2})
    assert found.groups[name].tolist() == [1, 0, 1] and float(found.trace[name][0]) < 1e-12
    with torch.no_grad():
        assert torch.allclose(
            found.model(**batch).logits, net(**batch).logits, atol=1e-6 if family == "llama" else 1e-9
        )
    assert sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in net.parameters())


def shared_keys(family, heads=12, keys=3):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=30, hidden_size=24, intermediate_size=14, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=4,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval(), llama()[1]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_equal_query_heads_of_one_key_merge_exactly(family):
    net, batch = shared_keys(family)
    name = "model.layers.0.self_attn.q_proj"
    attention = net.model.layers[0].self_attn
    pairs = [(0, 3), (5, 6), (8, 10)]  # one for each key
    with torch.no_grad():
        if family == "Qwen2":
            attention.q_proj.bias.normal_()
        for one, other in pairs:
            a, b = (torch.arange(4 * head, 4 * head + 4) for head in (one, other))
            attention.q_proj.weight[b] = attention.q_proj.weight[a]
            attention.o_proj.weight[:, b] = attention.o_proj.weight[:, a]
            if family == "Qwen2":
                attention.q_proj.bias[b] = attention.q_proj.bias[a]
        found = merge(net, example=batch, sites=name, keep={name: 3})
        assert [found.sizes[f"{name}[{key}]"] for key in range(3)] == [(4, 3)] * 3
        assert max(float(found.trace[f"{name}[{key}]"][0]) for key in range(3)) < 1e-12
        for key, (one, other) in enumerate(pairs):
            merged = found.groups[f"{name}[{key}]"]
            assert merged[one - 4 * key] == merged[other - 4 * key] and len(merged.unique()) == 3
        assert torch.allclose(found.model(**batch).logits, net(**batch).logits, atol=1e-12)
        with pytest.raises(InputError, match="4 query heads for each key, got 5"):
            merge(net, example=batch, keep={name: 5})
        # Other heads: the mean of how they attend, the sum of what they write, keys and values as they are.
        whole = merge(net, example=batch, sites="*q_proj", keep=0.25).model
        small = whole.model.layers[1].self_attn
        q, o = (getattr(net.model.layers[1].self_attn, f"{part}_proj").weight for part in "qo")
        torch.testing.assert_close(small.q_proj.weight[:4], q[:16].view(4, 4, -1).mean(0))
        torch.testing.assert_close(small.o_proj.weight[:, :4], o[:, :16].view(24, 4, 4).sum(1))
    assert torch.equal(small.k_proj.weight, net.model.layers[1].self_attn.k_proj.weight)
    assert whole.config.num_attention_heads == whole.config.num_key_value_heads == 3
    assert merge(net, example=batch, sites="*q_proj", params=0.95).share <= 0.95


def test_a_stream_read_by_layer_norm_stays_whole():
    net, batch = made("gpt2")
    found = merge(net, example=batch, keep=0.5)
    assert "statistic" in found.whole["transformer.wte"] and "transformer.wte" not in found.sizes
    assert found.model.config.n_inner == 24 and found.model.config.num_attention_heads == 2


@pytest.mark.parametrize("what", ["params", "flops"])
def test_budgets_are_kept(what):
    found = merge(mlp(6, 20, 16, 3), example=X, **{what: 0.5})
    before, after = found.parameters if what == "params" else found.flops
    assert 0.42 * before < after <= 0.5 * before


def test_rescaling_finds_channels_that_differ_by_a_factor():
    net = mlp(6, 7, 3)
    duplicate(net[0], 1, 3)
    with torch.no_grad():
        net[0].weight[3] *= 5
        net[0].bias[3] *= 5
        net[2].weight[:, 3] = net[2].weight[:, 1] / 5
    found = merge(net, example=X, beta=1e-12, rescale=True)
    assert found.sizes["0"] == (7, 6) and torch.allclose(found.model(X), net(X), atol=1e-10)
    assert merge(net, example=X, beta=1e-12).sizes["0"] == (7, 7)
    smooth = mlp(6, 7, 3, act=nn.GELU)
    assert torch.allclose(merge(smooth, example=X, beta=0.0, rescale=True).model(X), smooth(X), atol=1e-12)


def test_a_channel_without_weights_merges_with_another_of_none():
    net = mlp(6, 7, 3)
    with torch.no_grad():
        for row in (2, 5):
            net[0].weight[row], net[0].bias[row], net[2].weight[:, row] = 0.0, 0.0, 0.0
    found = merge(net, example=X, beta=0.0)
    assert found.sizes["0"] == (7, 6) and torch.allclose(found.model(X), net(X), atol=1e-12)


def test_repair_restores_mean_and_spread():
    net = mlp(6, 16, 3)
    found = merge(net, example=X, keep=0.5)
    better = repair(found, X)
    member = found.groups["0"]
    z, now = net[0](X), better.model[0](X)
    for k in range(8):
        assert torch.allclose(now[:, k].mean(), z[:, member == k].mean(), atol=1e-10)
        assert torch.allclose(
            now[:, k].std(unbiased=False), z[:, member == k].std(0, unbiased=False).mean(), atol=1e-10
        )
    normed = merge(conv_net(), example=IMAGES, sites="3.conv1", keep=0.5)
    layer = repair(normed).model[3].conv1
    assert (
        layer.weight.norm() > normed.model[3].conv1.weight.norm()
    )  # a mean of different rows is shorter than they are
    with pytest.raises(InputError, match="batch norms"):
        repair(found)


def test_swaps_tell_found_groups_from_random_ones():
    torch.manual_seed(0)
    net = mlp(6, 24, 3)
    for k in range(8):
        duplicate(net[0], k, 8 + k, 16 + k)
    x = torch.randn(400, 6, dtype=torch.float64)
    found = swap_test(merge(net, example=X, beta=0.0, distance="in"), (x.float(), net(x).argmax(1)))
    assert found.moved == 24 and found.agreement == 1 > found.random_agreement + 0.1
    with pytest.raises(InputError, match="nothing to swap"):
        swap_test(merge(net, example=X, sites="0", keep=1.0), (x, net(x).argmax(1)))


def test_equivalence_error_is_zero_for_the_same_in_another_order():
    net = mlp(6, 7, 3)
    order = [3, 1, 0, 2, 6, 5, 4]
    other = permute(net, {channel_groups(net, X)["0"]: order})
    assert equivalence_error(net, other, {"0": order}, X)["0"] < 1e-12
    assert equivalence_error(net, other, {"0": list(range(7))}, X)["0"] > 0.5
    with pytest.raises(InputError, match="permutation"):
        equivalence_error(net, other, {"0": [0, 0, 1, 2, 3, 4, 5]}, X)


def test_a_merged_network_is_saved_without_pickle(tmp_path):
    found = merge(conv_net(), example=IMAGES, keep=0.5)
    again = load(save(found.model, tmp_path), conv_net)
    assert torch.equal(again.eval()(IMAGES), found.model(IMAGES))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"sites": "nine"}, "nine.*'0'"),
        ({"keep": {"0": 9}}, "8 channels"),
        ({"params": 0.0}, "params"),
        ({"params": 0.001}, "cannot be reached"),
        ({"beta": 0.1, "keep": 0.5}, "several targets"),
        ({"rule": "sum"}, "rule"),
    ],
)
def test_bad_input_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        merge(mlp(6, 8, 3), example=X, **options)


def test_weights_that_cannot_be_merged_are_refused():
    net = mlp(6, 8, 3)
    bad = copy.deepcopy(net)
    bad[0].weight.data[1, 1] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight.*not finite"):
        merge(bad, example=X)
    with pytest.raises(InputError, match=r"TorchScript|ScriptModule"):
        merge(torch.jit.script(net), example=X)
    assert called(merge(mlp(6, 8, 3).half().float(), example=X.float()).model, X.float()).shape == (50, 3)
