"""Small dictionaries of every kind."""

from __future__ import annotations

from typing import Any

import torch

from lineament.dictionaries.autoencoders import BatchTopK, Gated, JumpReLU, Neurons, ReLU, TopK
from lineament.dictionaries.factorisations import NMF, PCA, ConvexNMF, SemiNMF
from lineament.dictionaries.normalised import Normalised
from lineament.dictionaries.selection import Selection

D, WIDTH = 6, 200
OPTIONS = {"d": D, "width": WIDTH, "site": "layer"}
MEMBERS = {
    "relu": lambda: ReLU(**OPTIONS),
    "gated": lambda: Gated(**OPTIONS),
    "jumprelu": lambda: JumpReLU(**OPTIONS),
    "topk": lambda: TopK(**OPTIONS, k=3),
    "topk of uncentred inputs": lambda: TopK(**OPTIONS, k=3, subtract_bias=False),
    "batchtopk": lambda: BatchTopK(**OPTIONS, k=3),
    "gradient topk": lambda: TopK(**OPTIONS, k=3, selection=Selection(beta=2.0, influence_scale=0.5)),
    "layer-normalised topk": lambda: Normalised(TopK(**OPTIONS, k=3), form="layer_norm"),
    "relu of a constant norm": lambda: Normalised(ReLU(**OPTIONS), form="constant_norm"),
    "centred gated": lambda: Normalised(Gated(**OPTIONS), form="centred"),
    "neurons": lambda: Neurons(D, site="layer"),
    "k neurons": lambda: Neurons(D, k=2, site="layer"),
    "nmf": lambda: NMF(D, 4, site="layer"),
    "overcomplete nmf": lambda: NMF(D, 9, site="layer", ridge=0.1),
    "semi-nmf": lambda: SemiNMF(D, 4, site="layer"),
    "convex nmf": lambda: ConvexNMF(D, 4, site="layer"),
    "pca": lambda: PCA(D, 4, site="layer"),
}


def made(name: str) -> Any:
    """A member with weights of its own: atoms of norm 1, some features on and some off."""
    dictionary = MEMBERS[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in dictionary.named_parameters():
            large = key.rpartition(".")[2][0] == "W"
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1 if large else 0.1))
        inner = getattr(dictionary, "inner", dictionary)
        if hasattr(inner, "W_dec"):
            inner.W_dec.div_(inner.W_dec.norm(dim=1, keepdim=True))
        if hasattr(dictionary, "basis"):
            basis = torch.randn(dictionary.basis.shape, generator=generator)
            basis = basis.abs() if isinstance(dictionary, NMF) else basis
            basis = torch.linalg.qr(basis.T)[0].T if isinstance(dictionary, PCA) else basis
            dictionary.basis.copy_(basis / basis.norm(dim=1, keepdim=True))
    return dictionary
