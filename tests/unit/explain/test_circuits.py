"""Nodes and circuits: dictionaries that are the activation itself, circuits of everything and nothing, paths that add up."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import prompts, tiny
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.circuit_curves import CircuitCurve, averaged_curve, circuit_curve
from lineament.explain.patching.circuit_nodes import Units, component_nodes
from lineament.explain.patching.circuits import node_effects
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching

METRIC = logit_difference([5, 6, 7], [8, 9, 10])
NOISING = {"direction": "noising", "normalise": False}


class Sparse(nn.Module):
    """A dictionary with an error."""

    def __init__(self, width, count, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(width, count).double(), nn.Linear(count, width).double()
        self.requires_grad_(False)

    def encode(self, x):
        return self.encoder(x).relu()

    def decode(self, f):
        return self.decoder(f)


def case(family="gpt2"):
    return tiny(family, torch.float64, std=0.15), *prompts()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_the_activation_as_its_own_dictionary_nodes_are_the_sites(family):
    model, clean, corrupt = case(family)
    nodes = component_nodes(model, ["z", "mlp_out", "neurons"])
    for method, other in (
        ("attrib", attribution_patching),
        ("relp", relevance_patching),
        ("exact", activation_patching),
    ):
        found = node_effects(model, clean, corrupt, METRIC, dictionaries=nodes, method=method)
        want = other(model, clean, corrupt, METRIC, sites=["z", "mlp_out", "neurons"], **NOISING)
        assert not found.errors
        values = list(found.features.values())
        for k, kind in enumerate(("z", "mlp_out", "neurons")):
            scores = want.per_example[kind]
            for layer in range(2):
                expected = scores[:, layer] if scores.ndim == 4 else scores[:, layer, :, None]
                torch.testing.assert_close(values[2 * k + layer], expected, atol=1e-6, rtol=1e-5)


def test_an_identity_dictionary_without_the_short_cut_has_the_same_effects():
    class Identity:
        def encode(self, x):
            return x

        def decode(self, f):
            return f

    model, clean, corrupt = case()
    site = "transformer.h.0.mlp.c_proj:in"
    for method in ("attrib", "relp", "ig", "exact"):
        a, b = (
            node_effects(model, clean, corrupt, METRIC, dictionaries={site: d}, method=method, steps=3)
            for d in (Identity(), Units())
        )
        torch.testing.assert_close(a.features[site], b.features[site])
        assert a.errors[site].abs().max() < 1e-12 and not b.errors


def test_a_long_path_adds_up_to_the_effect_of_the_whole_site():
    model, clean, corrupt = case()
    site = "transformer.h.1:in"
    dictionaries = {site: Sparse(24, 40)}
    whole = activation_patching(
        model, clean, corrupt, METRIC, sites="resid_pre", positions="together", **NOISING
    )
    want = whole.per_example["resid_pre"][:, 1, 0]
    gaps = []
    for steps in (10, 40, 160):
        found = node_effects(
            model, clean, corrupt, METRIC, dictionaries=dictionaries, method="ig", steps=steps
        )
        total = found.features[site].sum((1, 2)) + found.errors[site].sum(1)
        gaps.append(float((total - want).abs().max()))
    assert gaps[2] < gaps[1] < gaps[0] and gaps[2] < 0.02 * float(want.abs().max())


def test_first_order_effects_do_not_count_twice():
    """Feature and error effects together are the difference of the activations times its gradient."""
    model, clean, corrupt = case()

    class Linear(Sparse):
        def encode(self, x):
            return self.encoder(x)

    site = "transformer.h.1:in"
    found = node_effects(model, clean, corrupt, METRIC, dictionaries={site: Linear(24, 40)}, method="attrib")
    want = attribution_patching(model, clean, corrupt, METRIC, sites="resid_pre", **NOISING).per_example[
        "resid_pre"
    ][:, 1]
    torch.testing.assert_close(found.features[site].sum(-1) + found.errors[site], want)


@pytest.mark.parametrize("dictionary", ["units", "heads", "sparse"])
def test_circuits_of_everything_and_of_nothing(dictionary):
    model, clean, corrupt = case()
    if dictionary == "heads":
        dictionaries = component_nodes(model, ["z", "mlp_out"])
    else:
        make = Units if dictionary == "units" else lambda: Sparse(24, 40)
        dictionaries = {f"transformer.h.{k}:in": make() for k in (0, 1)}
    effects = node_effects(model, clean, corrupt, METRIC, dictionaries=dictionaries)
    curve = circuit_curve(
        model, clean, corrupt, METRIC, effects, dictionaries=dictionaries, thresholds=[-1.0, 0.01, 1e9]
    )
    assert curve.faithfulness[0] == pytest.approx(1.0) and curve.completeness[0] == pytest.approx(
        0.0, abs=1e-9
    )
    assert curve.faithfulness[-1] == pytest.approx(0.0, abs=1e-9) and curve.completeness[-1] == pytest.approx(
        1.0
    )
    each = {"units": 24, "heads": 0, "sparse": 41}[dictionary]
    assert curve.nodes[0] == (2 * 6 * each or 2 * 6 * 5) and curve.nodes[-1] == 0
    assert curve.full == pytest.approx(float(METRIC(model(clean).logits).mean().detach()))
    assert curve.at([curve.nodes[1]]) == pytest.approx([curve.faithfulness[1]])
    assert curve.plot(label="x").get_xlabel() == "nodes in the circuit"


def test_error_nodes_can_be_nodes_or_kept_or_removed():
    model, clean, corrupt = case()
    dictionaries = {"transformer.h.1:in": Sparse(24, 40)}
    effects = node_effects(model, clean, corrupt, METRIC, dictionaries=dictionaries)
    options = {"dictionaries": dictionaries, "thresholds": [-1.0, 1e9]}
    curves = {
        e: circuit_curve(model, clean, corrupt, METRIC, effects, errors=e, **options)
        for e in ("default", "remove", "keep")
    }
    assert curves["default"].nodes[0] == 6 * 41 and curves["keep"].nodes[0] == 6 * 40
    assert curves["keep"].faithfulness[0] == pytest.approx(1.0)
    assert abs(curves["remove"].faithfulness[0] - 1) > 1e-3 and abs(curves["keep"].faithfulness[1]) > 1e-3
    assert curves["default"].empty == curves["keep"].empty == curves["remove"].empty


def test_layers_below_the_start_are_left_as_they_are():
    model, clean, corrupt = case()
    sites = [f"transformer.h.{k}:in" for k in (0, 1)]
    both = {site: Sparse(24, 40) for site in sites}
    effects = node_effects(model, clean, corrupt, METRIC, dictionaries=both)
    options = {"thresholds": [-1.0, 0.01, 1e9]}
    from_one = circuit_curve(
        model, clean, corrupt, METRIC, effects, dictionaries=both, start_layer=1, **options
    )
    late = {sites[1]: both[sites[1]]}
    alone = circuit_curve(model, clean, corrupt, METRIC, effects, dictionaries=late, **options)
    assert from_one == alone and from_one.nodes[0] == 6 * 41
    # What is mean-ablated in the first block changes the metric, unless the start lies behind it.
    parts = component_nodes(model, "mlp_out")
    effects_of = node_effects(model, clean, corrupt, METRIC, dictionaries=parts)
    empties = [
        circuit_curve(model, clean, corrupt, METRIC, effects_of, dictionaries=parts, start_layer=k).empty
        for k in (0, 1)
    ]
    assert empties[0] != empties[1]
    with pytest.raises(InputError, match="start_layer: got 2, before which lie all sites"):
        circuit_curve(model, clean, corrupt, METRIC, effects, dictionaries=both, start_layer=2)
    with pytest.raises(InputError, match="start_layer: got -1"):
        circuit_curve(model, clean, corrupt, METRIC, effects, dictionaries=both, start_layer=-1)


def test_tasks_are_averaged_at_common_numbers_of_nodes():
    a = CircuitCurve((), (100, 10, 1), (1.0, 0.5, 0.0), (0.0, 0.4, 1.0), 2.0, 0.0)
    b = CircuitCurve((), (4, 400), (0.2, 1.0), (0.8, 0.0), 4.0, 1.0)
    mean = averaged_curve([a, b])
    assert mean.nodes[0] == 4 and mean.nodes[-1] == 100 and list(mean.nodes) == sorted(set(mean.nodes))
    at = dict(zip(mean.nodes, zip(mean.faithfulness, mean.completeness)))
    assert at[4] == pytest.approx(((3 / 9 * 0.5 + 0.2) / 2, (1 - 3 / 9 * 0.6 + 0.8) / 2))
    assert at[100] == pytest.approx(((1 + 0.2 + 0.8 * 96 / 396) / 2, (0.8 - 0.8 * 96 / 396) / 2))
    assert (mean.full, mean.empty) == (3.0, 0.5) and averaged_curve([a]).at([10]) == [0.5]
    with pytest.raises(InputError, match="expected curves that overlap"):
        averaged_curve([b, CircuitCurve((), (1, 2), (0.0, 1.0), (1.0, 0.0), 2.0, 0.0)])
    with pytest.raises(InputError, match="curves: got none"):
        averaged_curve([])


def test_bad_dictionaries_are_refused_by_name():
    model, clean, corrupt = case()
    for dictionaries, words in (
        ({}, "expected {site: an object"),
        ({"transformer.h.0:in": 3}, "encode"),
        ({"transformer.h.9:in": Units()}, "nearest"),
        ({"transformer.h.0.attn:z": Units()}, "view of heads"),
    ):
        with pytest.raises(InputError, match=words):
            node_effects(model, clean, corrupt, METRIC, dictionaries=dictionaries)

    class Narrow(Sparse):
        def decode(self, f):
            return f[..., :1].mean(1)

    with pytest.raises(InputError, match="expected the site's shape"):
        node_effects(
            model, clean, corrupt, METRIC, dictionaries={"transformer.h.0:in": Narrow(24, 4)}, method="ig"
        )
    dictionaries = {"transformer.h.0:in": Units()}
    effects = node_effects(model, clean, corrupt, METRIC, dictionaries=dictionaries)
    with pytest.raises(InputError, match="of 6 positions"):
        circuit_curve(model, clean[:, :5], corrupt[:, :5], METRIC, effects, dictionaries=dictionaries)
    with pytest.raises(InputError, match="nothing to be faithful to"):
        circuit_curve(
            model, clean[:1], clean[:1], logit_difference([5], [6]), effects, dictionaries=dictionaries
        )


class Dense:
    """A dictionary without its sparse face."""

    def __init__(self, inner):
        self.inner = inner

    def encode(self, x):
        return self.inner.encode(x)

    def decode(self, f):
        return self.inner.decode(f)


def sparse_dictionary(kind, width=24, count=40, k=5):
    from lineament import dictionaries

    generator = torch.Generator().manual_seed(3)
    made = getattr(dictionaries, kind)(width, count, **({"k": k} if kind == "TopK" else {})).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made.requires_grad_(False)


@pytest.mark.parametrize("method", ["attrib", "relp", "ig", "exact"])
@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_active_latents_have_the_effects_that_all_latents_have(kind, method):
    model, clean, corrupt = case()
    sites = ("transformer.h.0", "transformer.h.1.mlp")
    sae = sparse_dictionary(kind)
    options = {"method": method, "steps": 3}
    sparse = node_effects(model, clean, corrupt, METRIC, dictionaries=dict.fromkeys(sites, sae), **options)
    dense = node_effects(
        model, clean, corrupt, METRIC, dictionaries=dict.fromkeys(sites, Dense(sae)), **options
    )
    for site in sites:
        assert dense.features[site].abs().max() > 1e-4
        torch.testing.assert_close(sparse.features[site].dense(), dense.features[site], atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(sparse.errors[site], dense.errors[site], atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(sparse.mean(site), dense.features[site].mean(0), atol=1e-9, rtol=1e-7)
    if method == "exact":
        return
    levels = [0.0, 1e-3, 1e-2, 10.0]
    curves = [
        circuit_curve(
            model, clean, corrupt, METRIC, effects, dictionaries=dict.fromkeys(sites, each), thresholds=levels
        )
        for effects, each in ((sparse, sae), (dense, Dense(sae)))
    ]
    assert curves[0].nodes == curves[1].nodes and len(set(curves[0].nodes)) > 2
    for which in ("faithfulness", "completeness"):
        a, b = (torch.tensor(getattr(curve, which)) for curve in curves)
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


def test_a_wide_dictionary_costs_what_is_active(monkeypatch):
    """No tensor of batch x positions x latents is made, in the effects or in the curve; the encoder works in chunks of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lineament.dictionaries.topk import select

    sizes = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [
                each
                for each in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(each, torch.Tensor)
            ]
            sizes.extend(each.untyped_storage().nbytes() for each in made)
            return out

    monkeypatch.setattr(select, "BYTES", 2**21)
    model, (clean, corrupt) = tiny("gpt2"), prompts(batch=24, length=16)
    width, site = 20000, "transformer.h.0"
    sae, metric = sparse_dictionary("TopK", count=width).float(), logit_difference([5] * 24, [8] * 24)
    with Sizes():
        effects = node_effects(model, clean, corrupt, metric, dictionaries={site: sae})
        circuit_curve(
            model, clean, corrupt, metric, effects, dictionaries={site: sae}, thresholds=[0.0, 1e-2]
        )
    dense = 24 * 16 * width * 4
    assert max(sizes) <= dense / 10, (max(sizes), dense)
