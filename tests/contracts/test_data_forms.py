"""Whoever takes data takes them as Python holds them: a pair of tensors or arrays, Samples, a Dataset, a DataLoader, a list of batches; the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.data.samples import Samples
from lineament.edit import fidelity
from lineament.learn import GBNNClassifier, boosted_head, layers_worth
from lineament.measure import (
    alignment,
    collapse,
    complexity,
    equivalence_error,
    line,
    perturbations,
    random_axes,
    variance_explained,
)  # fmt: skip

X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()

FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "tensors in a list": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "samples": lambda: Samples(X, Y),
    "data set": lambda: TensorDataset(X, Y),
    "loader": lambda: DataLoader(TensorDataset(X, Y), 50),
    "batches": lambda: [(X[:70], Y[:70]), (X[70:], Y[70:])],
}


def _product(kind: Callable[..., Any]) -> Callable[[nn.Module, Any], Tensor]:
    return lambda net, data: kind(net, F.cross_entropy, data) @ torch.ones(43)


def _head(net: nn.Module, data: Any) -> Tensor:
    head = GBNNClassifier(total_units=4, units_per_step=2, max_iter=5, random_state=0)
    return boosted_head(net, data, head=head)(X)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "hessian": _product(hessian),
    "gauss_newton": _product(gauss_newton),
    "fisher": _product(fisher),
    "line": lambda net, data: line(net, F.cross_entropy, data, random_axes(net, 1, seed=0)[0]).loss,
    "perturbations": lambda net, data: perturbations(net, F.cross_entropy, data, count=2).rises,
    "collapse": lambda net, data: collapse(net, data)["2:in"].nc1_tilde,
    "equivalence_error": lambda net, data: equivalence_error(net, net, {"0": [1, 0, 2, 3, 4]}, data)["0"],
    "boosted_head": _head,
    "layers_worth": lambda net, data: [each.logistic for each in layers_worth(net, data, data).layers],
    "fidelity": lambda net, data: fidelity(net, data, sites=["2"])["2"].scores.saliency,
    "alignment": lambda net, data: alignment(net, net, data, sites=["0"], blocks=2).cka,
    "variance_explained": lambda net, data: (
        variance_explained(net, data, {"x": X[:, 0]}, sites=["0"])["0"].features[0].r2
    ),
    "complexity": lambda net, data: complexity(net, data, X[:, :1], sites=["0"]).complexity,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_form_of_data_gives_the_same_numbers(call: str, form: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    found, wanted = (torch.as_tensor(CALLS[call](net, FORMS[kind]())) for kind in (form, "batches"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_path_an_iterator_and_unequal_lengths_are_refused() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(InputError, match="read it with load"):
        hessian(net, F.cross_entropy, "digits.npz")
    with pytest.raises(InputError, match="an iterator"):
        hessian(net, F.cross_entropy, iter([(X, Y)]))
    with pytest.raises(InputError, match="120 inputs and 119 targets"):
        hessian(net, F.cross_entropy, (X, Y[1:]))
