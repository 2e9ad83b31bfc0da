"""The Triton kernels against PyTorch's operations, on the CPU by Triton's interpreter; left out where Triton is not installed.

The interpreter must be chosen before Triton is imported, and so the tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.topk import select, step, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels")
DEVICE = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="is in it")
@pytest.mark.slow
def test_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def in_order(indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    indices, order = indices.sort(-1)
    return indices, values.gather(-1, order)


@interpreted
@pytest.mark.parametrize(("width", "k"), [(1, 1), (63, 63), (640, 5), (641, 4), (4096, 1), (1000, 256)])
@pytest.mark.parametrize("score", [None, "sum", "product", "signed"])
def test_the_best_are_those_of_all_scores(width: int, k: int, score: str | None) -> None:
    z, along = normal(2, width), normal(2, width, seed=1)
    selection = None if score is None else Selection(score=score, beta=1.5, influence_scale=0.7)
    found = triton.best(z, k, selection, along)
    assert found is not None
    scores = z if selection is None else selection.scores(z, along)
    best = scores.topk(k, -1).indices
    values = z.gather(1, best).relu() * ((scores.gather(1, best) > 0) if score == "signed" else 1)
    if score != "signed":  # there many scores are 0, and which of them fill a row is free
        indices, kept = in_order(*found)
        expected, those = in_order(best, values)
        assert torch.equal(indices, expected) and torch.equal(kept, those)
    dense = [
        torch.zeros_like(z).scatter(1, i, v) for i, v in (found, (best, values))
    ]  # fmt: skip
    assert torch.equal(*dense)


@interpreted
@pytest.mark.parametrize("width", [50, 700])
def test_equal_values_give_k_places(width: int) -> None:
    z = torch.zeros(2, width, device=DEVICE)
    z[1, 17:29] = -1.0
    z[:, 40] = 2.0
    z[1, 41] = -torch.inf
    found = triton.best(z, 6)
    assert found is not None
    for row in found[0].tolist():
        assert len(set(row)) == 6 and 40 in row and not set(row) & {17, 41}


@interpreted
def test_what_does_not_fit_is_left_to_pytorch() -> None:
    assert triton.best(normal(1, 40_000), 300) is None
    assert triton.best(normal(1, 640), 4, Selection(score="topk_of_l1"), normal(1, 640)) is None


@interpreted
@pytest.mark.parametrize(("d", "active"), [(3, 1), (300, 17)])
def test_sparse_products(d: int, active: int) -> None:
    count, width, most = 25, 22, 20  # some latents are on in more rows than one tile has
    atoms, rows, weights = normal(width, d), normal(count, d, seed=1), normal(count, active, seed=2)
    indices = normal(count, most, seed=3).argsort(1)[:, :active]
    torch.testing.assert_close(triton.decode(indices, weights, atoms), step.decoded(indices, weights, atoms))
    torch.testing.assert_close(triton.dots(indices, atoms, rows), select.dots(indices, atoms, rows))
    by_latent = step.ByLatent(indices, width)
    found = triton.sums(by_latent.order, by_latent.starts, weights, rows)
    torch.testing.assert_close(found, by_latent.sums(weights, rows))
    assert torch.equal(found, triton.sums(by_latent.order, by_latent.starts, weights, rows))
    assert not found[most:].any()
    part = triton.sums(by_latent.order, by_latent.starts[7:10], weights, rows)
    assert torch.equal(part, found[7:9])


@interpreted
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 1300), (11,)])
def test_adam(unit: bool, shape: tuple[int, ...]) -> None:
    if unit and len(shape) == 1:
        pytest.skip("has no rows")
    one = torch.nn.functional.normalize(normal(*shape), dim=-1)
    other = one.clone()
    names = ("w",) if unit else ()
    eager, m, v = step.Adam({"w": one}, unit=names), torch.zeros_like(one), torch.zeros_like(one)
    for number in range(1, 5):
        grad = normal(*shape, seed=number)
        eager.step({"w": grad.clone()}, 0.01, 0.5)
        assert triton.adam_(
            other, grad, m, v, torch.tensor(0.5, device=DEVICE), size=0.01 / (1 - 0.9**number),
            root=(1 - 0.999**number) ** 0.5, betas=(0.9, 0.999), eps=6.25e-10, unit=unit,
        )  # fmt: skip
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize(("score", "precision"), [("sum", "full"), ("signed", "bfloat16")])
def test_a_whole_step(score: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, gradients with dead latents, and two steps of the optimizer."""
    d, width, rows = 24, 150, 5
    x, g = normal(rows, d), normal(rows, d, seed=5)
    dead = torch.arange(width, device=DEVICE) % 9 == 0

    def two_steps() -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        sae = TopK(d, width, k=1, selection=Selection(score=score, precision=precision)).to(DEVICE)
        with torch.no_grad():
            for number, p in enumerate(sae.parameters()):
                p.copy_(normal(*p.shape, seed=number + 9) / d**0.5)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        parameters = {name: p.detach() for name, p in sae.named_parameters()}
        adam, dense, first = step.Adam(parameters, unit=("W_dec",)), [], {}
        for _ in range(2):
            codes = sae.codes(x, gradient=g)
            dense.append(codes.dense().detach())
            found, _ = step.gradients(sae, x, codes, dead=dead, k_aux=3, variance=1.0)
            first = first or {name: grad.clone() for name, grad in found.items()}
            adam.step(found, 1e-3, torch.tensor(0.7))
        return dense, first, parameters

    dense, first, parameters = two_steps()
    for module in (select, step):
        monkeypatch.setattr(module, "kernels", lambda *tensors: triton)
    again, firsts, others = two_steps()
    assert torch.equal(dense[0] != 0, again[0] != 0)
    torch.testing.assert_close(again, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(firsts, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others, parameters, rtol=1e-4, atol=1e-5)
