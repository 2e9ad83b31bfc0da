"""Coefficients, scores, activation patching, single rules, conservation and dictionary nodes against the reference numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tests.golden.common import ACTIVATIONS, File, Scope, golden
from tests.golden.relp_networks import (
    LAYOUT,
    Conserving,
    Decoder,
    Dictionary,
    Downstream,
    huggingface,
    linear,
    norm,
)
from torch import Tensor, nn

from lineament.core.sites.activations import capture, record
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.circuit_curves import circuit_curve
from lineament.explain.patching.circuits import node_effects
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.patching.result import fidelity
from lineament.explain.relevance.rules import relevance_rules

NAMES = {"LN": "ln", "ID": "identity", "AH": "ah", "HALF": "half"}
METRICS = {("normalized_logit_difference", -1): logit_difference}
SITES = {
    False: {"resid_pre": "blocks.{}:in", "attn_out": "blocks.{}.attn", "mlp_out": "blocks.{}.mlp"},
    True: {
        "resid_pre": "transformer.h.{}:in",
        "attn_out": "transformer.h.{}.attn",
        "mlp_out": "transformer.h.{}.mlp",
    },
}


class Patched:
    """A model of a file and its patching, by activations and by rules."""

    def __init__(self, file: File, known: bool):
        weights = {name[2:]: file.input(name) for name in file.arrays(r"w\..+")}
        sizes = tuple(file[key] for key in ("n_heads", "d_model", "d_head"))
        assert tuple(weights["blocks.0.attn.W_Q"].shape) == sizes
        assert (
            weights["blocks.0.mlp.W_in"].shape[1] == file["d_mlp"]
            and len(weights["embed.W_E"]) == file["d_vocab"]
        )
        assert len(weights["pos_embed.W_pos"]) == file["n_ctx"]
        self.file, self.known = file, known
        self.model = huggingface(weights, file) if known else Decoder(weights, file).eval()
        self.clean, self.corrupt, answers = (file.input(key) for key in ("clean", "corrupt", "answers"))
        self.metric = METRICS[file["metric"], file["position"]](answers[:, 0], answers[:, 1])
        kinds = ("blocks", *file["site"])
        self.options: dict[str, Any] = {"sites": file["site"] if known else {k: LAYOUT[k] for k in kinds}}
        self.truth = activation_patching(self.model, self.clean, self.corrupt, self.metric, **self.options)

    def logits(self, ids: Tensor) -> Tensor:
        out = self.model(ids)
        return getattr(out, "logits", out)

    def sites(self, kind: str) -> list[str]:
        return [SITES[self.known][kind].format(k) for k in range(self.file["n_layers"])]

    def rules(self, case: Scope) -> dict[str, Any]:
        """Half acts on gates, and attention of an unknown model is told by its modules."""
        parts = [NAMES[rule] for rule in case["rules"] if rule != "HALF" or case["gated_mlp"]]
        if "ah" not in parts or self.known:
            return {"rules": parts}
        detached = {"blocks.**.q_proj": "detach", "blocks.**.k_proj": "detach"}
        return {"rules": [*(p for p in parts if p != "ah"), detached]}

    def scores(self, case: Scope) -> tuple[Any, dict[str, float]]:
        """The scores of a rule set, and by site their correlation with activation patching."""
        found = relevance_patching(
            self.model, self.clean, self.corrupt, self.metric, **self.rules(case), **self.options
        )
        return found.scores, {
            kind: agreement.pearson for kind, agreement in fidelity(found, self.truth).items()
        }

    def coefficients(self, case: Scope, kind: str) -> Tensor:
        sites = self.sites(kind)
        with (
            relevance_rules(self.model, **self.rules(case)),
            capture(self.model, sites, gradients=True) as acts,
        ):
            logits = self.logits(self.corrupt)
            score = self.metric(logits).mean() / (self.truth.source - self.truth.base)
        assert torch.equal(logits, self.logits(self.corrupt))
        found = acts.gradients(score)
        return torch.stack([found[site] for site in sites])


def patched(file: File) -> Iterator[Patched]:
    yield Patched(file, known=False)
    if (
        file["normalization_type"] == "LN"
        and not file["gated_mlp"]
        and file["n_heads"] * file["d_head"] == file["d_model"]
    ):
        yield Patched(file, known=True)


def check_model(file: File) -> None:
    for run in patched(file):
        for ids, logits, at in (
            (run.clean, "clean_logits", "act_clean"),
            (run.corrupt, "corr_logits", "act_corr"),
        ):
            file.compare(logits, run.logits(ids))
            for name, m in file.arrays(rf"{at}_(.+)").items():
                sites = run.sites(m[1])
                found = record(run.model, {"input_ids": ids} if run.known else ids, sites)
                file.compare(name, torch.stack([found[site] for site in sites]))
        file.compare("logit_diff", torch.tensor([run.truth.source, run.truth.base], dtype=torch.float64))
        file.compare("act_patch", torch.stack([run.truth.scores[kind] for kind in file["site"]]))
        for case in file.cases:
            scores, agreement = run.scores(case)
            for kind in case["site"]:
                case.compare(f"{case.name}.score_{kind}", scores[kind])
                case.compare(f"{case.name}.pearson_{kind}", agreement[kind])
                if case.has(f"{case.name}.coef_{kind}"):
                    case.compare(f"{case.name}.coef_{kind}", run.coefficients(case, kind))


def check_config(file: File) -> None:
    for name in file["file"]:
        if name not in file.nodes:
            continue
        file.input(f"{name}.config")  # the model's sizes
        # Of the official flag, which the library does not have.
        file.input(f"{name}.pearson.posthoc_equals_no_identity")
        if (file.path.parent / f"{name}.npz").exists():
            for run in patched(file.beside(f"{name}.npz")):
                for case in run.file.cases:
                    for kind, pearson in run.scores(case)[1].items():
                        file.compare(f"{name}.pearson.{case.name}.{kind}", pearson)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Identity()

    def forward(self, p, q):
        return self.down(p * q)


class Attend(nn.Module):
    def __init__(self, file: Scope):
        super().__init__()
        self.q, self.k = nn.Identity(), nn.Identity()
        self.options = {"is_causal": file["causal"], "scale": file["attn_scale"]}

    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(
            self.q(q)[None], self.k(k)[None], v[None], **self.options
        )[0]


def ruled(
    module: nn.Module, rules: Any, inputs: list[Tensor], upstream: Tensor | None, **options: Any
) -> tuple[Any, ...]:
    """The output, and the coefficient of each input (none where nothing is handed down)."""
    inputs = [x.requires_grad_() for x in inputs]
    with relevance_rules(module.eval(), rules, **options):
        y = module(*inputs)
    upstream = torch.ones_like(y) if upstream is None else upstream
    return y, *torch.autograd.grad(y, inputs, upstream, allow_unused=True)


def check_rules(file: File) -> None:
    for name in file["act"]:
        act = ACTIVATIONS[name]()
        value, coefficient = ruled(act, "identity", [file.input("act_x")], None)
        file.compare(f"{name}_value", value)
        file.compare(f"{name}_coef_exact", coefficient)
        # The official form phi(x) / (x + eps sign x): the epsilon rule of a linear map with weight 1 before the activation.
        both = nn.Sequential(linear(torch.ones(1, 1).double()), act)
        _, coefficient = ruled(
            both,
            {"0": "epsilon", "1": "identity"},
            [file.input("act_x")[:, None]],
            None,
            eps=file["identity_eps"],
        )
        for array in file.arrays(rf"{name}_coef_eps.+"):
            file.compare(array, coefficient[:, 0])
    if file.has("norm_x"):
        v = file.input("norm_upstream")
        for kind, rule, array in (
            ("LN", "ln", "ln_coef"),
            ("RMS", "ln", "rms_coef"),
            ("LN", "gradient", "ln_grad"),
        ):
            module = norm(file.input("norm_w"), file.input("norm_b"), file["norm_eps"], kind)
            file.compare(array, ruled(module, {nn.Module: rule}, [file.input("norm_x")], v)[1])
    if file.has("gate_p"):
        gates = [file.input("gate_p"), file.input("gate_q")]
        for array, found in zip(
            "pq", ruled(Gate(), {"down": "half"}, gates, file.input("norm_upstream"))[1:]
        ):
            file.compare(f"half_coef_{array}", found)
    if file.has("attn_q"):
        parts = [file.input(f"attn_{key}") for key in "qkv"]
        y, dq, dk, dv = ruled(
            Attend(file), {"q": "detach", "k": "detach"}, parts, file.input("attn_upstream")
        )
        assert dq is None and dk is None
        file.compare("attn_out", y)
        file.compare("ah_coef_v", dv)


BLOCK_RULES: dict[str, dict[Any, str]] = {
    "LN": {nn.RMSNorm: "ln"},
    "ID": {"act": "identity"},
    "HALF": {"Wd": "half"},
    "AH": {"Wq": "detach", "Wk": "detach"},
}


def check_conservation(file: File) -> None:
    model, x = Conserving(file).eval(), file.input("x").requires_grad_()
    rules = {module: rule for name in file["rules"] for module, rule in BLOCK_RULES[name].items()}
    with relevance_rules(model, rules), capture(model, ["y", "z"], gradients=True) as acts:
        metric = model(x if x.ndim == 3 else x[None]).sum()
    found = torch.autograd.grad(metric, [x, acts["y"], acts["z"]], retain_graph=True)
    sums = torch.stack([(c * a).sum() for c, a in zip(found, (x, acts["y"], acts["z"]))])
    file.compare("metric", metric)
    file.compare("coef_x", found[0])
    file.compare("relevance_sums", sums)
    if set(file["rules"]) == set(BLOCK_RULES):
        torch.testing.assert_close(sums, metric.expand(3))


def check_features(file: File) -> None:
    model, dictionaries = Downstream(file).eval(), {"h": Dictionary(file)}
    clean, patch = file.input("h_clean"), file.input("h_patch")
    options: dict[str, Any] = {"dictionaries": dictionaries}
    told = (file["ig_rule"], file["ig_path"], file["ablation"])
    assert told == ("left", "all nodes from clean to patch", "patch_mean_per_position"), (
        f"the library has no {told}"
    )
    file.compare("total_effect", model(patch) - model(clean))
    effects = {}
    for method in dict.fromkeys([*file["attribution"], file["node_effect"]]):
        rules = [NAMES[rule] for rule in file["rules"]]
        effects[method] = node_effects(
            model,
            clean,
            patch,
            lambda y: y,
            method=method,
            steps=int(file["ig_steps"]),
            rules=rules,
            **options,
        )
        file.compare(f"{method}_feat", effects[method].features["h"])
        file.compare(f"{method}_err", effects[method].errors["h"])
    thresholds = file["thresholds"].tolist()
    curve = circuit_curve(
        model, clean, patch, lambda y: y, effects[file["node_effect"]], thresholds=thresholds, **options
    )
    file.compare("n_nodes", torch.tensor(curve.nodes))
    file.compare("m_full", curve.full)
    file.compare("m_empty", curve.empty)
    for name in ("faithfulness", "completeness"):
        file.compare(name, torch.tensor(getattr(curve, name), dtype=torch.float64))


test_golden, test_a_wrong_number_is_noticed = golden(
    "relp",
    {
        "model": check_model,
        "config": check_config,
        "rules": check_rules,
        "sae_features": check_features,
        "conservation": check_conservation,
    },
    # A key's bias shifts all logits of a query alike, and a read-out of the last position attends to all of them in any case.
    fixed=("model:identity_eps", "w.blocks.*.b_K", "conservation:causal", "rules:norm_b"),
)
