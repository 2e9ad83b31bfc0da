"""Contrastive losses and heads against the released code, and the linear theory against closed forms and gradient descent."""

from __future__ import annotations

import torch
from tests.golden.common import File, golden, listed
from torch import Tensor

from lineament.core.checks import InputError
from lineament.learn.projection import theory
from lineament.learn.projection.heads import Reweighting, SymmetricReLU
from lineament.losses.contrastive import NTXent, SupCon


def check_losses(file: File) -> None:
    if file.has("z"):
        check_contrast(file)
    if file.has("head_x"):
        check_heads(file)


def check_contrast(file: File) -> None:
    assert file["reduction"] == "mean"
    z, labels, views = file.input("z"), file.input("labels"), int(file["num_views"])
    assert len(z) == views * len(labels)
    temperatures = torch.as_tensor(file["temperatures"]).flatten().tolist()
    losses, gradients = [], []
    for temperature in temperatures:
        x = z.clone().requires_grad_()
        loss = SupCon(temperature)(x, labels)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, x)[0])
    file.compare("supcon", torch.stack(losses))
    file.compare("supcon_grad", torch.stack(gradients))
    if file.has("ntxent"):
        file.compare("ntxent", NTXent(temperatures[file["ntxent_temperature_index"]], views)(z))
    try:
        SupCon(temperatures[0])(z[: len(labels)], torch.arange(len(labels)))
        raises = False
    except InputError:
        raises = True
    file.compare("no_positive_raises", torch.tensor(raises))


def check_heads(file: File) -> None:
    x = file.input("head_x")
    if file.has("reweight_out"):
        check_kappas(file, x)
    for bias in listed(file["bias"]):
        file.compare(f"symrelu_b{bias}", lambda: SymmetricReLU(bias).double()(x))  # noqa: B023


def check_kappas(file: File, x: Tensor) -> None:
    kappas = torch.as_tensor(file["kappas"]).flatten().tolist()
    file.compare("reweight_out", torch.stack([Reweighting(x.shape[1], kappa)(x) for kappa in kappas]))


def check_theory(file: File) -> None:
    if file.has("phi"):
        check_features(file)
    if file.has("M"):
        check_moments(file)


def check_features(file: File) -> None:
    views = theory.feature_weights(*(file.input(name) for name in ("phi", "alpha", "sigma")))
    for name, found in {
        "M_diag": views.moment,
        "Mt_diag": views.across,
        "F_diag": views.minimiser,
        "post_weight": views.after,
        "pre_weight": views.before,
    }.items():
        file.compare(name, found)
    if not file.has("sqrtF_diag_weight_decay"):
        return
    decays = torch.as_tensor(file["weight_decays"]).flatten().tolist()
    file.compare(
        "sqrtF_diag_weight_decay",
        torch.stack([theory.decayed_weights(views.moment, views.across, decay) for decay in decays]),
    )


def check_moments(file: File) -> None:
    moment, across = file.input("M"), file.input("Mt")
    # An embedding with more dimensions than the inputs limits nothing.
    rank = min(int(file["rank"]), len(moment))
    best, low = theory.minimiser(moment, across), theory.minimiser(moment, across, rank)
    file.compare("lambdas", theory.invariance(moment, across))
    file.compare("F", best)
    file.compare("F_rank_p", low)
    file.compare("loss_min", theory.lowest_loss(moment, across))
    file.compare("loss_min_rank_p", theory.lowest_loss(moment, across, rank))
    file.compare("pre_gram", theory.layer_gram(best, 1, 2))
    file.compare("pre_gram_rank_p", theory.layer_gram(low, 1, 2))
    if file.has("W_probe"):
        W = file.input("W_probe")
        file.compare("loss_at_W", theory.spectral_loss(W, moment, across))
        file.compare("grad_at_W", theory.spectral_gradient(W, moment, across))
    for depth in listed(file["depth"]):
        for layer in listed(file["layer"]):
            if layer <= depth:
                file.compare(f"gd_depth{depth}_layer{layer}_gram", theory.layer_gram(best, layer, depth))


test_golden, test_a_wrong_number_is_noticed = golden(
    "projection-head",
    {"losses_and_heads": check_losses, "linear_theory": check_theory},
    fixed=("depth", "layer", "bias"),  # they name arrays: another one is compared with nothing
)
