"""Coefficients, scores, activation patching, single rules, conservation and dictionary nodes against the reference numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.golden.common import files
from tests.golden.relp_networks import Conserving, Decoder, Dictionary, Downstream, huggingface
from torch import nn

from lineament.core.sites.activations import capture, record
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.circuit_curves import circuit_curve
from lineament.explain.patching.circuits import node_effects
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import fidelity
from lineament.explain.relevance.rules import relevance_rules

KINDS = ["resid_pre", "attn_out", "mlp_out"]
ACTS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}
NAMES = {"LN": "ln", "ID": "identity", "AH": "ah", "HALF": "half"}


def arrays(path: Path) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path, allow_pickle=False).items()}


def kind(path: Path) -> str:
    if path.suffix == ".json":
        return "config"
    keys = set(np.load(path, allow_pickle=False).files)
    for name, mark in (
        ("model", "act_patch"),
        ("rules", "act_x"),
        ("sae", "sae_W_enc"),
        ("conservation", "relevance_sums"),
    ):
        if mark in keys:
            return name
    raise AssertionError(f"{path.name}: no adapter reads this file")


def of_kind(name: str) -> list[Path]:
    return [p for p in files("relp") if p.suffix == ".npz" and kind(p) == name]


def configs() -> dict:
    found = {}
    for path in files("relp"):
        if path.suffix == ".json":
            found |= json.loads(path.read_text())
    return found


@pytest.mark.parametrize("path", files("relp"), ids=lambda p: p.name)
def test_every_file_is_recognised(path):
    assert kind(path)
    if kind(path) == "model":
        assert path.stem in configs()


LAYOUT = {
    "blocks": "blocks.?",
    "resid_pre": "blocks.?:in",
    "attn_out": "blocks.*.attn",
    "mlp_out": "blocks.*.mlp",
}


def models():
    for path in of_kind("model"):
        config = configs()[path.stem]["config"]
        yield pytest.param(path, "written out", id=f"{path.stem}-written-out")
        if config["normalization_type"] == "LN" and not config.get("gated_mlp"):
            yield pytest.param(path, "transformers", id=f"{path.stem}-transformers")


@pytest.mark.parametrize(("path", "how"), list(models()))
def test_scores_are_those_of_the_official_code(path, how):
    d, config = arrays(path), configs()[path.stem]["config"]
    w = {k[2:]: v for k, v in d.items() if k.startswith("w.")}
    known = how == "transformers"
    model = huggingface(w, config) if known else Decoder(w, config).eval()
    options = {"sites": KINDS if known else LAYOUT}
    metric = logit_difference(d["answers"][:, 0], d["answers"][:, 1])
    with torch.no_grad():
        for ids, logits in (("clean", "clean_logits"), ("corrupt", "corr_logits")):
            out = model(d[ids])
            torch.testing.assert_close(getattr(out, "logits", out), d[logits], atol=1e-9, rtol=0)
    truth = activation_patching(model, d["clean"], d["corrupt"], metric, **options)
    assert (
        abs(truth.source - float(d["logit_diff"][0])) < 1e-9
        and abs(truth.base - float(d["logit_diff"][1])) < 1e-9
    )
    for k, name in enumerate(KINDS):
        torch.testing.assert_close(truth.scores[name], d["act_patch"][k], atol=1e-9, rtol=0)
    pre = "transformer.h.{}:in" if known else "blocks.{}:in"
    for ids, key in (("clean", "act_clean_resid_pre"), ("corrupt", "act_corr_resid_pre")):
        found = record(
            model,
            {"input_ids": d[ids]} if known else d[ids],
            [pre.format(k) for k in range(config["n_layers"])],
        )
        torch.testing.assert_close(torch.stack(list(found.values())), d[key], atol=1e-9, rtol=0)
    named = sorted({k.split(".score_")[0] for k in d if ".score_" in k})
    assert named
    for rules in named:
        parts = [] if rules == "atp" else [NAMES[p] for p in rules.removesuffix("_only").split("_")]
        parts = [p for p in parts if p != "half" or config.get("gated_mlp")]
        modules = {}
        if "ah" in parts and not known:
            parts.remove("ah")
            modules = {"blocks.*.q_proj": "detach", "blocks.*.k_proj": "detach"}
        result = relevance_patching(
            model, d["clean"], d["corrupt"], metric, rules=[*parts, modules], **options
        )
        for name in KINDS:
            want = d[f"{rules}.score_{name}"]
            # The official identity-rule divides by x + 1e-6 sign x.
            tolerance = float(want.abs().max()) * 1e-4 if "identity" in parts else 1e-9
            torch.testing.assert_close(
                result.scores[name],
                want,
                atol=tolerance,
                rtol=0,
                msg=lambda m, r=rules, n=name: f"{r} {n}: {m}",
            )
        agreement = fidelity(result, truth)
        recorded = configs()[path.stem]["pearson"][rules]
        for name in KINDS:
            tolerance = 1e-4 if "identity" in parts else 1e-8
            assert abs(agreement[name].pearson - float(d[f"{rules}.pearson_{name}"])) < tolerance
            assert abs(agreement[name].pearson - recorded[name]) < tolerance
        sites = [pre.format(k) for k in range(config["n_layers"])]
        with relevance_rules(model, [*parts, modules]), capture(model, sites, gradients=True) as acts:
            out = model(d["corrupt"])
            logits = getattr(out, "logits", out)
            score = metric(logits).mean() / (truth.source - truth.base)
        assert torch.equal(
            logits.detach(), getattr(model(d["corrupt"]), "logits", model(d["corrupt"])).detach()
        )
        coefficients = torch.stack(list(acts.gradients(score).values()))
        want = d[f"{rules}.coef_resid_pre"]
        tolerance = float(want.abs().max()) * 1e-4 if "identity" in parts else 1e-9
        torch.testing.assert_close(coefficients, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("path", of_kind("rules"), ids=lambda p: p.name)
def test_single_rules_are_the_closed_forms(path):
    d = arrays(path)
    close = {"atol": 1e-10, "rtol": 0}
    for name in {k.rsplit("_", 1)[0] for k in d if k.endswith("_value")}:
        x = d["act_x"].clone().requires_grad_()
        module = ACTS[name].eval()
        with relevance_rules(module, "identity"):
            y = module(x)
        torch.testing.assert_close(y.detach(), d[f"{name}_value"], **close)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], d[f"{name}_coef_exact"], **close)
    size, eps = d["norm_x"].shape[-1], float(d["norm_eps"])
    for norm, rules, want in (
        (nn.LayerNorm(size, eps), "ln", "ln_coef"),
        (nn.RMSNorm(size, eps), "ln", "rms_coef"),
        (nn.LayerNorm(size, eps), "gradient", "ln_grad"),
    ):
        norm.weight = nn.Parameter(d["norm_w"])
        if isinstance(norm, nn.LayerNorm):
            norm.bias = nn.Parameter(d["norm_b"])
        x = d["norm_x"].clone().requires_grad_()
        with relevance_rules(norm.eval(), {nn.Module: rules}):
            y = norm(x)
        torch.testing.assert_close(torch.autograd.grad(y, x, d["norm_upstream"])[0], d[want], **close)

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Identity()

        def forward(self, p, q):
            return self.down(p * q)

    p, q = d["gate_p"].clone().requires_grad_(), d["gate_q"].clone().requires_grad_()
    gate = Gate().eval()
    with relevance_rules(gate, {"down": "half"}):
        y = gate(p, q)
    for found, want in zip(
        torch.autograd.grad(y, [p, q], d["norm_upstream"]), ("half_coef_p", "half_coef_q")
    ):
        torch.testing.assert_close(found, d[want], **close)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Identity(), nn.Identity()

        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(self.q(q), self.k(k), v, is_causal=True)

    q, k, v = (d[f"attn_{n}"].clone().requires_grad_() for n in "qkv")
    attend = Attend().eval()
    with relevance_rules(attend, {"q": "detach", "k": "detach"}):
        y = attend(q[None], k[None], v[None])[0]
    torch.testing.assert_close(y.detach(), d["attn_out"], **close)
    dq, dk, dv = torch.autograd.grad(y, [q, k, v], d["attn_upstream"], allow_unused=True)
    assert dq is None and dk is None
    torch.testing.assert_close(dv, d["ah_coef_v"], **close)


@pytest.mark.parametrize("path", of_kind("conservation"), ids=lambda p: p.name)
def test_relevance_is_conserved_at_every_cut(path):
    d = arrays(path)
    model = Conserving(d).eval()
    x = d["x"].clone().requires_grad_()
    batched = x if x.ndim == 3 else x[None]
    rules = {nn.RMSNorm: "ln", "act": "identity", "Wd": "half", "Wq": "detach", "Wk": "detach"}
    with relevance_rules(model, rules), capture(model, ["y", "z"], gradients=True) as acts:
        score = model(batched).sum()
    torch.testing.assert_close(score.detach(), d["metric"].sum(), atol=1e-10, rtol=0)
    found = torch.autograd.grad(score, [x, acts["y"], acts["z"]], retain_graph=True)
    torch.testing.assert_close(found[0], d["coef_x"], atol=1e-10, rtol=0)
    sums = torch.stack([(c * a).sum() for c, a in zip(found, (x, acts["y"], acts["z"]))]).detach()
    torch.testing.assert_close(sums, d["relevance_sums"], atol=1e-10, rtol=0)
    torch.testing.assert_close(sums, score.detach().expand(3), atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", of_kind("sae"), ids=lambda p: p.name)
def test_dictionary_nodes_have_the_reference_effects(path):
    d = arrays(path)
    model, dictionaries = Downstream(d).eval(), {"h": Dictionary(d)}
    close = {"atol": 1e-10, "rtol": 0}

    def metric(output):
        return output

    torch.testing.assert_close(
        model(d["h_patch"]).detach() - model(d["h_clean"]).detach(), d["total_effect"], **close
    )
    found = {}
    for method in ("attrib", "relp", "ig", "exact"):
        options = {
            "dictionaries": dictionaries,
            "method": method,
            "steps": int(d["ig_steps"]),
            "rules": ("ln", "identity"),
        }
        found[method] = node_effects(model, d["h_clean"], d["h_patch"], metric, **options)
        torch.testing.assert_close(found[method].features["h"], d[f"{method}_feat"], **close)
        torch.testing.assert_close(found[method].errors["h"], d[f"{method}_err"], **close)
    curve = circuit_curve(
        model,
        d["h_clean"],
        d["h_patch"],
        metric,
        found["relp"],
        dictionaries=dictionaries,
        thresholds=d["thresholds"].tolist(),
    )
    assert list(curve.nodes) == d["n_nodes"].tolist()
    assert abs(curve.full - float(d["m_full"])) < 1e-10 and abs(curve.empty - float(d["m_empty"])) < 1e-10
    for name in ("faithfulness", "completeness"):
        torch.testing.assert_close(torch.tensor(getattr(curve, name), dtype=torch.float64), d[name], **close)
