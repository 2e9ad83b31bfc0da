"""Patching in every family against patches made one at a time with plain hooks, and closed forms and invariances of the scores."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.contracts.language_models import FAMILIES, GATED, prompts, tiny
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch, record
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.components import KINDS, find_components
from lineament.explain.patching.edges import edge_patching
from lineament.explain.patching.integrated import integrated_patching
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.relevance.rules import relevance_rules

METRIC = logit_difference([5, 6, 7], [8, 9, 10])


def kinds_of(family):
    return [kind for kind in KINDS if not (family == "pythia" and kind == "resid_mid")]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_patches_from_the_middle_are_patches_made_one_by_one(family):
    """Every kind of site, with blocks skipped and nodes side by side, against one whole forward with one hook."""
    model, (clean, corrupt) = tiny(family), prompts()
    kinds = [kind for kind in kinds_of(family) if kind != "resid_mid"]
    result = activation_patching(
        model, clean, corrupt, METRIC, sites=kinds, positions=[1, 4], batch_size=7, normalise=False
    )
    generator = torch.Generator().manual_seed(0)
    for kind in kinds:
        per_kind = result.scores[kind]
        for place in find_components(model, kind)[0]:
            name = place.read.name
            value = record(model, clean, name)[name]
            units = range(per_kind.shape[2]) if per_kind.ndim == 3 else [None]
            picks = torch.randint(len(units), (3,), generator=generator).tolist() if len(units) > 1 else [0]
            for column, position in enumerate((1, 4)):
                for unit in (units[p] for p in picks):

                    def change(x, position=position, unit=unit, value=value):
                        x[(slice(None), position) if unit is None else (slice(None), position, unit)] = (
                            value[:, position] if unit is None else value[:, position, unit]
                        )
                        return x

                    with torch.no_grad(), patch(model, {name: change}):
                        want = METRIC(model(corrupt).logits).mean()
                    want = float(want) - result.base
                    found = (
                        per_kind[place.layer, column] if unit is None else per_kind[place.layer, column, unit]
                    )
                    assert abs(float(found) - want) < 1e-4 * max(1.0, abs(want)), (
                        kind,
                        place.layer,
                        position,
                        unit,
                    )
    if "resid_mid" in kinds_of(family):
        # Everything after the middle of a block, clean at all positions, is the clean run from there on.
        middle = activation_patching(model, clean, corrupt, METRIC, sites="resid_mid", positions="together")
        torch.testing.assert_close(middle.scores["resid_mid"], torch.ones(2, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_difference_times_gradient(family):
    model, (clean, corrupt) = tiny(family), prompts()
    kinds = [kind for kind in kinds_of(family) if kind != "resid_mid"]
    result = attribution_patching(model, clean, corrupt, METRIC, sites=kinds, normalise=False)
    for kind in kinds:
        for place in find_components(model, kind)[0]:
            name = place.read.name
            source = record(model, clean, name)[name]
            with capture(model, name, gradients=True) as acts:
                score = METRIC(model(corrupt).logits).sum()
            product = (source - acts[name]) * acts.gradients(score)[name]
            want = product if kind == "neurons" else product.sum(-1)
            torch.testing.assert_close(
                result.per_example[kind][:, place.layer],
                want.detach(),
                atol=1e-5,
                rtol=1e-4,
                msg=lambda m, k=kind: f"{k}: {m}",
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", ["relp", "relp+ah", "attnlrp"])
def test_rules_change_the_coefficients_and_not_the_logits(family, rules):
    model, (clean, corrupt) = tiny(family), prompts()
    reference = model(corrupt).logits
    with relevance_rules(model, rules) as coverage:
        assert torch.equal(model(corrupt).logits, reference)
    want = {"ln", "identity"} | ({"half"} if family in GATED else set())
    want |= {"relp": set(), "relp+ah": {"ah"}, "attnlrp": {"uniform"}}[rules]
    assert coverage.modules.keys() == want and not coverage.idle()
    norms = {"qwen3": 9, "gemma2": 9, "gemma3": 13}.get(family, 5)
    assert len(coverage.modules["ln"]) == norms and len(coverage.modules["identity"]) == 2
    result = relevance_patching(model, clean, corrupt, METRIC, rules=rules, sites=["mlp_out", "q", "k", "v"])
    plain = attribution_patching(model, clean, corrupt, METRIC, sites=["mlp_out", "q", "k", "v"])
    assert not torch.allclose(result.scores["mlp_out"], plain.scores["mlp_out"])
    assert result.scores["v"].abs().max() > 0
    if rules == "relp+ah":
        assert result.scores["q"].abs().max() == 0 == result.scores["k"].abs().max()
    elif rules == "relp":
        assert result.scores["q"].abs().max() > 0


def linear_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2)).double().eval()


OPTIONS = {"sites": {"first": "0", "second": "1"}}


def difference(output):
    return output[:, 0] - output[:, 1]


def test_in_a_linear_network_all_methods_agree():
    net, (clean, corrupt) = linear_network(), torch.randn(2, 5, 4).double()
    truth = activation_patching(net, clean, corrupt, difference, **OPTIONS)
    for method in (attribution_patching, relevance_patching, integrated_patching):
        for direction in ("denoising", "noising"):
            found = method(net, clean, corrupt, difference, direction=direction, **OPTIONS)
            other = activation_patching(net, clean, corrupt, difference, direction=direction, **OPTIONS)
            for kind in truth.scores:
                torch.testing.assert_close(found.scores[kind], other.scores[kind], atol=1e-12, rtol=0)
                torch.testing.assert_close(
                    found.per_example[kind], other.per_example[kind], atol=1e-12, rtol=0
                )
    # Each layer is a cut: patching all of it is the whole effect.
    for kind in truth.scores:
        torch.testing.assert_close(truth.scores[kind], torch.ones(1, 1).double())


def test_without_norms_relu_networks_need_no_rules():
    torch.manual_seed(0)
    for body in (
        [nn.Linear(4, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)],
        [
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 3, 2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(3, 3),
        ],
    ):
        net = nn.Sequential(*body).double().eval()
        clean, corrupt = torch.randn(2, 5, 4).double()
        options = {"sites": {"hidden": "1" if len(body) > 3 else "0"}}
        plain = attribution_patching(net, clean, corrupt, difference, **options)
        relevance = relevance_patching(net, clean, corrupt, difference, **options)
        assert torch.equal(plain.scores["hidden"], relevance.scores["hidden"])
        assert relevance.coverage == {"identity": 1}


def midpoints(count):
    return [(k + 0.5) / count for k in range(count)]


def test_integrated_gradients_add_up_to_the_effect_of_the_whole_site():
    model, (clean, corrupt) = tiny("llama", torch.float64, std=0.15), prompts()
    kinds = ["resid_pre", "mlp_out", "attn_out", "z", "neurons"]
    options = {"sites": kinds, "direction": "noising"}
    whole = activation_patching(
        model, clean, corrupt, METRIC, positions="together", sites=kinds[:3], direction="noising"
    )
    path = integrated_patching(model, clean, corrupt, METRIC, steps=midpoints(60), **options)
    for kind in kinds[:3]:
        torch.testing.assert_close(
            path.scores[kind].sum(1, keepdim=True), whole.scores[kind], atol=2e-3, rtol=0
        )
    left = integrated_patching(model, clean, corrupt, METRIC, steps=1, **options)
    plain = attribution_patching(model, clean, corrupt, METRIC, **options)
    inputs = integrated_patching(model, clean, corrupt, METRIC, steps=1, path="input", **options)
    for kind in kinds:
        torch.testing.assert_close(left.scores[kind], plain.scores[kind], atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(inputs.scores[kind], plain.scores[kind], atol=1e-9, rtol=1e-7)
    far = integrated_patching(model, clean, corrupt, METRIC, steps=[1.0], path="input", sites="resid_pre")
    back = attribution_patching(model, clean, corrupt, METRIC, direction="noising", sites="resid_pre")
    torch.testing.assert_close(far.scores["resid_pre"], back.scores["resid_pre"], atol=1e-9, rtol=1e-7)


def test_the_last_residual_stream_is_linear_given_its_scale():
    model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
    result = relevance_patching(model, clean, corrupt, METRIC, sites="resid_post", normalise=False)
    seen = {
        n: record(model, {"input_ids": ids}, "transformer.h.1")["transformer.h.1"]
        for n, ids in (("c", clean), ("k", corrupt))
    }
    x, move = seen["k"][:, -1], seen["c"][:, -1] - seen["k"][:, -1]
    sigma = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    logits = (
        (move - move.mean(-1, keepdim=True)) / sigma * model.transformer.ln_f.weight @ model.lm_head.weight.T
    )
    torch.testing.assert_close(result.per_example["resid_post"][:, 1, -1], METRIC(logits[:, None]).detach())


def folded(model):
    """The same GPT-2 with norm weights folded in, writing weights and the unembedding centred, and value biases folded: TransformerLens' processing."""
    import copy

    new = copy.deepcopy(model)
    new.lm_head = nn.Linear(*model.lm_head.weight.T.shape).to(model.lm_head.weight).eval()
    with torch.no_grad():
        for block in new.transformer.h:
            for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                linear.bias += norm.bias @ linear.weight
                linear.weight *= norm.weight[:, None]
                norm.weight.fill_(1.0), norm.bias.zero_()
            size = block.attn.c_proj.weight.shape[0]
            block.attn.c_proj.bias += block.attn.c_attn.bias[2 * size :] @ block.attn.c_proj.weight
            block.attn.c_attn.bias[2 * size :] = 0.0
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                linear.weight -= linear.weight.mean(1, keepdim=True)
                linear.bias -= linear.bias.mean()
        for table in (new.transformer.wte, new.transformer.wpe):
            table.weight = nn.Parameter(table.weight - table.weight.mean(1, keepdim=True))
        norm, old = new.transformer.ln_f, model.lm_head.weight
        new.lm_head.bias.copy_(old @ norm.bias)
        new.lm_head.weight.copy_(old * norm.weight)
        new.lm_head.weight -= new.lm_head.weight.mean(0)
        new.lm_head.bias -= new.lm_head.bias.mean()
        norm.weight.fill_(1.0), norm.bias.zero_()
    return new


@pytest.mark.parametrize("method", [activation_patching, attribution_patching, relevance_patching])
def test_scores_do_not_depend_on_how_the_weights_are_written(method):
    model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
    ours, theirs = (method(m, clean, corrupt, METRIC) for m in (model, folded(model)))
    for kind in ours.scores:
        torch.testing.assert_close(ours.scores[kind], theirs.scores[kind], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "gemma2"])
@pytest.mark.parametrize("rules", ["gradient", "relp"])
def test_the_edges_of_a_component_sum_to_its_score(family, rules):
    model, (clean, corrupt) = tiny(family), prompts()
    edges = edge_patching(model, clean, corrupt, METRIC, rules=rules)
    nodes = relevance_patching(
        model, clean, corrupt, METRIC, rules=rules, sites=["resid_pre", "attn_out", "mlp_out"]
    )
    sums = dict(zip(edges.upstream, edges.scores.nansum(1).tolist()))
    want = {"embed": nodes.scores["resid_pre"][0].sum()}
    for layer in range(2):
        want[f"attn {layer}"] = nodes.scores["attn_out"][layer].sum()
        want[f"mlp {layer}"] = nodes.scores["mlp_out"][layer].sum()
    assert sums == pytest.approx({k: float(v) for k, v in want.items()}, abs=2e-4, rel=1e-3)
    # 5 x 5, of which 15 go forwards; in parallel blocks the MLP does not see its own layer's attention.
    assert int(edges.scores.isnan().sum()) == (12 if family == "pythia" else 10)
    if family != "gemma2":
        heads = edge_patching(model, clean, corrupt, METRIC, rules=rules, heads=True)
        rows = [k for k, name in enumerate(heads.upstream) if name.startswith("head 0.")]
        bias = 0.0 if family == "llama" else 1e-3
        torch.testing.assert_close(
            heads.scores[rows].sum(0)[1:], edges.scores[1][1:], atol=1e-4 + bias, rtol=1e-3, equal_nan=True
        )
    else:
        with pytest.raises(InputError, match="normalises the sum"):
            edge_patching(model, clean, corrupt, METRIC, heads=True)
    assert len(edges.top(3)) == 3


def test_noising_and_denoising_are_each_others_mirror():
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    ours = activation_patching(model, clean, corrupt, METRIC, direction="noising")
    theirs = activation_patching(model, corrupt, clean, METRIC, direction="denoising")
    for kind in ours.scores:
        torch.testing.assert_close(ours.scores[kind], theirs.scores[kind], atol=1e-4, rtol=1e-4)


def test_zero_and_mean_corruption_put_in_zeros_and_means():
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    name = "transformer.h.1.mlp"
    for corruption, second in (("zero", None), ("mean", None), ("mean", corrupt)):
        options = {"sites": "mlp_out", "direction": "noising", "corruption": corruption, "normalise": False}
        result = activation_patching(model, clean, second, METRIC, **options)
        of = record(model, clean if second is None else second, name)[name]
        filler = torch.zeros_like(of) if corruption == "zero" else of.mean(0, keepdim=True).expand_as(of)

        def change(x, filler=filler):
            x[:, 3] = filler[:, 3]
            return x

        with torch.no_grad(), patch(model, {name: change}):
            want = METRIC(model(clean).logits)
        found = result.per_example["mlp_out"][:, 1, 3]
        torch.testing.assert_close(found, want - METRIC(model(clean).logits).detach(), atol=1e-4, rtol=1e-4)
        linear = attribution_patching(model, clean, second, METRIC, **options)
        with capture(model, name, gradients=True) as acts:
            score = METRIC(model(clean).logits).sum()
        want = ((filler - acts[name]) * acts.gradients(score)[name]).sum(-1)
        torch.testing.assert_close(linear.per_example["mlp_out"][:, 1], want.detach(), atol=1e-4, rtol=1e-4)


PADDED = {
    "activation": activation_patching,
    "attribution": attribution_patching,
    "relevance": relevance_patching,
    "integrated": integrated_patching,
    "AtP*": partial(attribution_patching, qk_fix=True, grad_drop=True),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_padding_changes_no_score(side, family):
    model, (clean, corrupt) = tiny(family), prompts()
    filler = torch.full((3, 2), 2)
    both = (lambda x: torch.cat([filler, x], 1)) if side == "left" else (lambda x: torch.cat([x, filler], 1))
    real = slice(2, None) if side == "left" else slice(None, -2)
    mask = torch.zeros(3, clean.shape[1] + 2, dtype=torch.long)
    mask[:, real] = 1
    for name, method in PADDED.items():
        kinds = ["q", "k", "mlp_out"] if name == "AtP*" else ["resid_pre", "z", "mlp_out"]
        want = method(model, clean, corrupt, METRIC, sites=kinds)
        found = method(model, both(clean), both(corrupt), METRIC, sites=kinds, attention_mask=mask)
        for kind in kinds:
            torch.testing.assert_close(found.scores[kind][:, real], want.scores[kind], atol=1e-3, rtol=1e-3)
            outside = found.scores[kind][:, :2] if side == "left" else found.scores[kind][:, -2:]
            assert outside.abs().max() == 0
