"""What every loss over embeddings keeps: number types, memory layout, order, scale, derivatives, threads, compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.losses import (
    UNPG,
    AdaFace,
    ArcFace,
    ClassHead,
    Combined,
    CosFace,
    Cosine,
    CurricularFace,
    Elastic,
    InfoNCE,
    MagFace,
    NegativeInterpolation,
    NTXent,
    PositiveExtrapolation,
    Queue,
    Spectral,
    SphereFace,
    SupCon,
    pair_loss,
)
from lineament.losses.margins import Margin
from lineament.losses.pair_losses import PAIR_LOSSES

N, D, CLASSES = 12, 6, 5


def head(margin: Margin, **options) -> ClassHead:
    return ClassHead(CLASSES, D, margin, 16.0, **options)


MADE = {
    "cosine": lambda: head(Cosine()),
    "sphereface": lambda: head(SphereFace()),
    "sphereface, m1": lambda: head(SphereFace(1.35)),
    "cosface": lambda: head(CosFace()),
    "arcface": lambda: head(ArcFace()),
    "arcface, taylor": lambda: head(ArcFace(guard="taylor")),
    "arcface, easy": lambda: head(ArcFace(guard="easy")),
    "arcface, plain autograd": lambda: head(ArcFace(), chunk=None),
    "combined": lambda: head(Combined()),
    "elastic, by rank": lambda: head(Elastic(match="rank")),
    "elastic cos, by rank": lambda: head(Elastic("cos", match="rank")),
    "magface": lambda: head(MagFace((1.0, 20.0))),
    "curricularface": lambda: head(CurricularFace(alpha=0.0)),
    "adaface": lambda: head(AdaFace(alpha=1.0)),
    "sampled": lambda: head(CosFace(), sample=0.5),
    "unpg": lambda: UNPG(head(CosFace())),
    "unpg, aux": lambda: UNPG(head(ArcFace()), aux="triplet"),
    **{name: lambda name=name: pair_loss(name) for name in PAIR_LOSSES},
    "supcon": SupCon,
    "supcon, cold": lambda: SupCon(0.02),
    "nt-xent": NTXent,
    "spectral": lambda: Spectral(unbiased=True),
    "info-nce": lambda: InfoNCE(0.2),
    "moco": lambda: InfoNCE(0.2, queue=Queue(20, D)),
    "moco, transformed": lambda: InfoNCE(
        0.2, queue=Queue(20, D), transform=[PositiveExtrapolation(), NegativeInterpolation()]
    ),
}
# By the lengths of embeddings, which another scale changes.
LENGTHS = {"sphereface", "magface", "adaface", "spectral"}


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64) * 3
    return x.to(dtype), torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 0])


def value(loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of embeddings; of those that compare two views, of the two halves."""
    if isinstance(loss, NTXent):
        return loss(x)
    if isinstance(loss, Spectral):
        return loss(*x.chunk(2))
    if isinstance(loss, InfoNCE):
        return loss(*F.normalize(x, dim=1).chunk(2))
    return loss(x, y)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MADE[name]().to(dtype)


def with_gradients(loss: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    found = value(loss, x, y)
    return [found, *torch.autograd.grad(found, [x, *(p for p in loss.parameters() if p.requires_grad)])]


@pytest.fixture(params=MADE)
def name(request) -> str:
    return request.param


def test_single_precision_gives_what_double_gives(name):
    if name == "moco, transformed":
        pytest.skip("its factors are drawn in the type of the embeddings, and others in another")
    double, single = (with_gradients(made(name, t), *data(t)) for t in (torch.float64, torch.float32))
    assert all(one.dtype == torch.float64 for one in double)
    for one, other in zip(double, single):
        torch.testing.assert_close(other.double(), one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_autocast_gives_a_wide_loss_near_the_exact_one(name):
    x, y = data(torch.float32)
    exact = value(made(name, torch.float32), x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(made(name, torch.float32), x.bfloat16(), y)
    assert found.dtype == torch.float32 and found.isfinite()
    # A cosine is right to 2^-8 or so: a loss to that times its scale, 80 at most, and twice in the circle's exponent.
    assert abs(float(found - exact)) < 0.05 * abs(float(exact)) + 0.4


def test_the_layout_in_memory_changes_nothing(name):
    x, y = data()
    lying = torch.stack([x, x], 2)[..., 0].T.contiguous().T
    assert not lying.is_contiguous()
    for one, other in zip(with_gradients(made(name), x, y), with_gradients(made(name), lying, y)):
        torch.testing.assert_close(one, other)


def test_the_order_of_samples_changes_nothing(name):
    x, y = data()
    half = torch.randperm(N // 2, generator=torch.Generator().manual_seed(1))
    order = torch.cat([half, half + N // 2])  # of both views alike
    one, gradient, *weights = with_gradients(made(name), x, y)
    other, turned, *others = with_gradients(made(name), x[order], y[order])
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(turned, gradient[order])
    torch.testing.assert_close(others, weights)


def test_lengths_of_embeddings_change_nothing_where_directions_are_meant(name):
    x, y = data()
    one, gradient, *_ = with_gradients(made(name), x, y)
    lengths = torch.rand(N, 1, generator=torch.Generator().manual_seed(1)).double() + 0.5
    other, scaled, *_ = with_gradients(made(name), x * lengths, y)
    if name in LENGTHS:
        assert abs(float(one - other)) > 1e-6
        return
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(scaled * lengths, gradient)
    torch.testing.assert_close((gradient * x).sum(1), torch.zeros(N).double(), rtol=0, atol=1e-8)


def test_gradients_are_those_of_differences(name):
    if name == "circle":
        pytest.skip("its weights are constants of the gradient, as published")
    x, y = data()
    loss = made(name)
    loss.requires_grad_(False)
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(2)).double()
    if name.startswith("moco"):
        direction[N // 2 :] = 0  # keys are constants of the gradient
    if name == "adaface":  # norms are constants of its gradient, as published: a turn does not change them
        direction -= x * (direction * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)

    def at(step: float) -> float:
        moved = x + step * direction
        if name == "adaface":
            moved = moved * (x.norm(dim=1) / moved.norm(dim=1))[:, None]
        return float(value(made(name), moved, y))

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    gradient = with_gradients(loss, x, y)[1]
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_threads_change_nothing(name):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(made(name), *data()))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("few", ["unpg", "supcon", "moco"])
def test_compiled_losses_are_the_same(few):
    x, y = data()
    torch.compiler.reset()
    expected = with_gradients(made(few), x, y)
    loss = made(few)
    compiled = torch.compile(loss, backend="aot_eager")
    given = x.clone().requires_grad_()
    if few == "moco":
        found = compiled(*F.normalize(given, dim=1).chunk(2))
    else:
        found = compiled(given, y)
    torch.testing.assert_close([found, *torch.autograd.grad(found, [given, *loss.parameters()])], expected)
