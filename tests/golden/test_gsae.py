"""Gradient-aware TopK autoencoders against an independent float64 evaluation of the specification's equations."""

from __future__ import annotations

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor

from lineament.core.codes import Codes
from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.metrics import error_metrics, output_metrics, usage
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk.step import auxiliary_codes, gradients, losses, without_radial_part_


def dictionary(file: Scope, k: int, beta: float) -> TopK:
    width, d = file.input("W_enc").shape
    sae = TopK(d, width, k=k, selection=Selection(beta=beta)).double()
    with torch.no_grad():
        sae.W_enc.copy_(file.input("W_enc"))
        sae.b_enc.copy_(file.input("b_enc"))
        sae.W_dec.copy_(file.input("W_dec").T)
        sae.b_dec.copy_(file.input("b_pre"))
    return sae


def scores(sae: TopK, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, along = sae.pre_activations(x).detach(), g @ sae.atoms.T
    return z, along.abs(), sae.selection.scores(z, along.clone())


def check_forward_backward(file: File) -> None:
    x, g = file.input("x").double(), file.input("grad_x").double()
    dead = file.input("dead").bool() if file.has("dead") else None
    for case in file.cases:
        sae = dictionary(file, case["k"], case["beta"])
        name, k_aux, alpha = case.name, case["k_aux"], case["alpha"]
        z, influence, score = scores(sae, x, g)
        case.compare("z", z)
        case.compare("influence", influence)
        case.compare(f"{name}.score", score)
        codes = sae.codes(x, gradient=g)
        case.compare(f"{name}.topk_idx", codes.indices.sort(-1).values)
        case.compare(f"{name}.latents", codes.dense())
        case.compare(f"{name}.recon", sae.decode(codes))
        measured = error_metrics(x, sae.decode(codes).detach())
        case.compare(f"{name}.mse", measured["mse"])
        case.compare(f"{name}.fvu", measured["fvu"])
        case.compare(f"{name}.nmse_openai", measured["nmse"])
        aux = auxiliary_codes(sae, sae.rows(x), dead, k_aux)
        case.compare(f"{name}.aux_latents", torch.zeros_like(z) if aux is None else aux.dense())
        found = losses(sae, x, codes, dead=dead, k_aux=k_aux)
        total = found.reconstruction + alpha * found.auxiliary
        case.compare(f"{name}.aux_loss", found.auxiliary)
        case.compare(f"{name}.total_loss", total)
        total.backward()
        by_autograd = {name: p.grad for name, p in sae.named_parameters()}
        with torch.no_grad():
            by_hand, again = gradients(sae, x, sae.codes(x, gradient=g), alpha=alpha, dead=dead, k_aux=k_aux)
        case.compare(f"{name}.aux_loss", again.auxiliary)
        for grads in (by_autograd, by_hand):
            case.compare(f"{name}.grad_W_enc", grads["W_enc"])
            case.compare(f"{name}.grad_b_enc", grads["b_enc"])
            case.compare(f"{name}.grad_W_dec", grads["W_dec"].T)
            case.compare(f"{name}.grad_b_pre", grads["b_dec"])
            projected = without_radial_part_(grads["W_dec"].clone(), sae.atoms)
            case.compare(f"{name}.grad_W_dec_projected", projected.T)


def check_edges(file: File) -> None:
    x, g = file.input("x").double(), file.input("grad_x").double()
    for case in file.cases:
        sae = dictionary(file, case["k"], case["beta"])
        codes = sae.codes(x, gradient=g)
        case.compare(f"{case.name}.score", scores(sae, x, g)[2])
        case.compare(f"{case.name}.latents", codes.dense())
        case.compare(f"{case.name}.recon", sae.decode(codes))


def check_metrics(file: File) -> None:
    labels = file.input("labels").long()
    clean, substituted, ablated = (file.input(f"logits_{name}") for name in ("orig", "sae", "ablate"))
    found = output_metrics(clean, substituted, labels, ablated=ablated)
    for ours, theirs in {
        "ce": "ce_orig",
        "ce_substituted": "ce_sae",
        "ce_ablated": "ce_ablate",
        "kl": "kl_orig_sae",
        "loss_recovered": "loss_recovered",
    }.items():
        file.compare(theirs, found[ours])
    used = usage(Codes.of_dense(file.input("latents")))
    file.compare("l0", used["l0"])
    file.compare("dead_fraction", used["dead"])
    file.compare("density", used["density"])


def check_hyperparameters(file: File) -> None:
    for name in file.data:
        file.input(name)


test_golden, test_a_wrong_number_is_noticed = golden(
    "gsae",
    {
        "forward_backward": check_forward_backward,
        "edge_cases": check_edges,
        "metrics": check_metrics,
        "hyperparameters": check_hyperparameters,
    },
    fixed=(
        "forward_backward:k_aux",
    ),  # with fewer dead latents than that, no number depends on it; tests/unit/dictionaries does
)
