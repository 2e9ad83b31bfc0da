"""What the landscape lens says, measured again in a few lines of PyTorch in float64 on the samples that it names."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh

NAMES = ["residual", "misnormalised", "bfloat16", "normed"]


class Measured:
    """The mean cross-entropy over some rows, its gradient and its Hessian."""

    def __init__(self, network, x, y, logits):
        self.network, self.x, self.y, self.logits = (
            copy.deepcopy(network).double().eval(),
            x.double(),
            y,
            logits,
        )
        self.weights = list(self.network.parameters())
        self.size = sum(w.numel() for w in self.weights)

    def loss(self, rows):
        return F.cross_entropy(self.logits(self.network(self.x[rows])), self.y[rows])

    def gradient(self, rows, graph=False):
        grads = torch.autograd.grad(self.loss(rows), self.weights, create_graph=graph)
        return torch.cat([g.reshape(-1) for g in grads])

    def ends(self, rows):
        """The largest and the smallest eigenvalue of the Hessian."""
        gradient = self.gradient(rows, graph=True)

        def product(v):
            v = torch.from_numpy(np.ascontiguousarray(v)).reshape(-1)
            pulled = torch.autograd.grad(gradient @ v, self.weights, retain_graph=True)
            return torch.cat([g.reshape(-1) for g in pulled]).numpy()

        operator = LinearOperator((self.size, self.size), matvec=product, dtype="float64")
        options = {"k": 1, "tol": 1e-3, "return_eigenvectors": False, "v0": np.ones(self.size)}
        return float(eigsh(operator, which="LA", **options)[0]), float(
            eigsh(operator, which="SA", **options)[0]
        )


@pytest.fixture(params=NAMES)
def case(request, networks, reports):
    network, x, y, logits = networks[request.param]
    section = reports(request.param)["landscape"]
    numbers = section["numbers"]
    halves = [torch.tensor(rows) for rows in numbers["rows"]]
    return section, numbers, Measured(network, x, y, logits), halves


def test_the_ends_of_the_spectrum_the_loss_and_the_gradient(case):
    _, numbers, measured, halves = case
    rows = torch.cat(halves)
    assert len(halves) == 2 and len(set(rows.tolist())) == len(rows) == numbers["samples"] >= 16
    assert numbers["loss"] == pytest.approx(float(measured.loss(rows)), rel=1e-3)
    assert numbers["gradient_norm"] == pytest.approx(float(measured.gradient(rows).norm()), rel=1e-2)
    for part, tops, bottoms in (
        (rows, numbers["top"], numbers["bottom"]),
        *zip(halves, numbers["halves"]["top"], numbers["halves"]["bottom"]),
    ):
        top, bottom = measured.ends(part)
        assert tops == pytest.approx(top, rel=1e-2)
        # The downward end of a spectrum that hardly has one is found to a share of its range.
        assert bottoms == pytest.approx(bottom, rel=0.1, abs=5e-3 * top)


def test_the_error_of_the_top_is_that_of_the_parts(case):
    _, numbers, measured, _ = case
    parts = [torch.tensor(rows) for rows in numbers["parts"]]
    assert len(parts) == 3 and sorted(torch.cat(parts).tolist()) == sorted(
        row for half in numbers["rows"] for row in half
    )
    tops = torch.tensor([measured.ends(part)[0] for part in parts], dtype=torch.double)
    # Student's t of two degrees of freedom; a bias of one over the number of samples.
    error = 4.303 * float(tops.std()) / 3**0.5 + abs(float(tops.mean()) - numbers["top"]) / 2
    assert numbers["errors"]["top"] == pytest.approx(error, rel=0.05)
    assert numbers["re"] == pytest.approx(max(-numbers["bottom"], 0) / numbers["top"])


def test_the_step_in_the_sentence_is_too_large_on_all_samples_and_on_either_half(case):
    section, numbers, *_ = case
    said = re.search(r"with a step above ([\d.,]+(?:e-?\d+)?) could not stay here", section["sentence"])
    if said is None:
        assert numbers["errors"]["top"] >= 0.5 * numbers["top"] and "too uncertain" in section["sentence"]
        return
    step = float(said[1].replace(",", ""))
    assert all(2 / top <= step * 1.01 for top in (numbers["top"], *numbers["halves"]["top"]))


def test_a_minimum_is_one_by_gradient_curvature_and_loss(case):
    """Whatever the verdict is, its three grounds are measured again, the noise of the gradient from single samples."""
    section, numbers, measured, halves = case
    rows = torch.cat(halves)
    each = torch.stack([measured.gradient(rows[k : k + 1]) for k in range(min(len(rows), 128))])
    noise = float((each - each.mean(0)).square().sum() / (len(each) - 1) / len(rows)) ** 0.5
    assert numbers["gradient_noise"] == pytest.approx(noise, rel=0.8), "an estimate from eight parts"
    with torch.no_grad():
        right = (measured.network(measured.x[rows]).argmax(1) == measured.y[rows]).double().mean()
    shares = measured.y[rows].bincount().double() / len(rows)
    constant = -float((shares[shares > 0] * shares[shares > 0].log()).sum())
    assert numbers["accuracy"] == pytest.approx(float(right), abs=0.02)
    assert numbers["constant_loss"] == pytest.approx(constant)
    steep = [
        bottom < -0.1 * top
        for top, bottom in zip(
            (numbers["top"], *numbers["halves"]["top"]), (numbers["bottom"], *numbers["halves"]["bottom"])
        )
    ]
    if numbers["settled"]:
        assert numbers["gradient_norm"] <= 2 * numbers["gradient_noise"] and not any(steep)
        assert numbers["loss"] < constant / 2 and "It sits in a minimum" in section["sentence"]
    else:
        assert "It sits in a minimum" not in section["sentence"] and section["status"] == "note"
        assert all(reason in section["sentence"] for reason in numbers["why"]) and numbers["why"]


def test_who_was_trained_on_these_samples_sits_in_a_minimum_and_who_sees_other_pixels_does_not(reports):
    assert reports("residual")["landscape"]["numbers"]["settled"] is True
    assert reports("residual")["landscape"]["status"] == "good"
    section = reports("misnormalised")["landscape"]
    assert section["numbers"]["settled"] is False and "It does not sit in a minimum" in section["sentence"]
    assert "best constant answer" in section["sentence"]


def test_bfloat16_has_the_curvature_of_its_weights(reports):
    half, single = (reports(name)["landscape"]["numbers"] for name in ("bfloat16", "residual"))
    # The weights themselves are rounded to three digits.
    assert half["top"] == pytest.approx(single["top"], rel=0.3) and half["settled"] == single["settled"]


def test_the_trace_and_the_share_of_flat_directions(networks, reports):
    """Of a network so small that its Hessian can be written down."""
    network, x, y, logits = networks["normed"]
    numbers = reports("normed")["landscape"]["numbers"]
    rows = torch.tensor([row for half in numbers["rows"] for row in half])
    measured = Measured(network, x, y, logits)
    gradient = measured.gradient(rows, graph=True)
    matrix = torch.stack(
        [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(entry, measured.weights, retain_graph=True)]
            )
            for entry in gradient
        ]
    )
    values = torch.linalg.eigvalsh(matrix)
    flat = float((values.abs() < 0.01 * values[-1]).double().mean())
    assert abs(numbers["trace"] - float(values.sum())) <= 2 * numbers["errors"]["trace"]
    assert abs(numbers["flat_share"] - flat) <= 2 * numbers["errors"]["flat_share"]
    assert math.isclose(numbers["eigenvalues"][1], float(values[-2]), rel_tol=1e-2)
