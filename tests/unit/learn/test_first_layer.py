"""TrAct's gradient by the closed forms, limits and invariances of the paper, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lineament.core.checks import InputError
from lineament.learn.tract import rows as row_products
from lineament.learn.tract.layer import tract
from lineament.learn.tract.rows import Use, divide, divide_wide, factorise, second_moment

pytestmark = pytest.mark.filterwarnings("ignore:.*mean square of its inputs")


@pytest.fixture(autouse=True)
def _same_numbers():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def gradients(layer: nn.Module, x, g, **options):
    """The weight's ordinary and TrAct gradients for the output gradient ``g``."""
    found = []
    for on in (False, True):
        layer.zero_grad()
        if on:
            with tract(layer, **options):
                layer(x).backward(g)
        else:
            layer(x).backward(g)
        found.append(layer.weight.grad.clone())
    return found


def linear(n: int, m: int, rows: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n, m).double()
    x = torch.randn(rows, n, generator=draw, dtype=torch.double)
    return layer, x, torch.randn(rows, m, generator=draw, dtype=torch.double)


def closed_form(X, G, lam):
    n = X.shape[1]
    return G.T @ X @ torch.linalg.inv(X.T @ X / len(X) + lam * torch.eye(n, dtype=X.dtype))


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 40])
@pytest.mark.parametrize("lam", [0.00625, 0.1, 1.6])
def test_it_is_the_least_squares_solution(rows, lam):
    layer, X, G = linear(8, 3, rows)
    _, found = gradients(layer, X, G, lam=lam)
    stacked = torch.cat([X, (lam * rows) ** 0.5 * torch.eye(8, dtype=torch.double)])
    wanted = torch.cat([rows * G, torch.zeros(8, 3, dtype=torch.double)])
    D = torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T
    torch.testing.assert_close(found, D, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, closed_form(X, G, lam), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 2), st.integers(0, 10_000))
def test_wide_and_tall_are_the_same(n, rows, lam, seed):
    layer, X, G = linear(n, 2, rows, seed)
    total, count = second_moment(Use(layer.weight.shape), X)
    tall = divide(G.T @ X, factorise(total / count, lam))
    if rows <= n:
        torch.testing.assert_close(
            divide_wide(G.T @ X, Use(layer.weight.shape), X, lam), tall, rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(tall, closed_form(X, G, lam), rtol=1e-9, atol=1e-9)


def test_limits_of_lambda():
    layer, X, G = linear(4, 3, 30)
    plain, weak = gradients(layer, X, G, lam=1e8)
    torch.testing.assert_close(weak * 1e8, plain, rtol=1e-6, atol=1e-6)
    # With fewer rows than columns the outputs can move by exactly the wanted step.
    layer, X, G = linear(30, 3, 4)
    errors = []
    for lam in (1e-2, 1e-4, 1e-6):
        D = gradients(layer, X, G, lam=lam)[1]
        errors.append(float((X @ D.T - len(X) * G).norm() / (len(X) * G).norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_many_columns_in_blocks():
    for n in (257, 300):
        layer, X, G = linear(n, 3, 2 * n)
        torch.testing.assert_close(second_moment(Use(layer.weight.shape), X)[0][0], X.T @ X)
        exact = closed_form(X, G, 0.1)
        torch.testing.assert_close(gradients(layer, X, G)[1], exact, rtol=1e-9, atol=1e-9)
        single = gradients(layer.float(), X.float(), G.float())[1]
        assert float((single - exact).abs().max() / exact.abs().max()) < 1e-5


def test_a_step_of_sgd_moves_the_outputs_as_asked():
    layer, X, G = linear(30, 3, 4)
    before = layer(X).detach()
    optimizer = torch.optim.SGD([layer.weight], lr=0.3)
    with tract(layer, lam=1e-7):
        layer(X).backward(G)
    optimizer.step()
    torch.testing.assert_close(layer(X) - before, -0.3 * 4 * G, rtol=1e-5, atol=1e-5)


def test_one_row_is_normalised_lms_and_white_data_only_rescales():
    layer, x, g = linear(6, 2, 1)
    _, found = gradients(layer, x, g, lam=0.3)
    torch.testing.assert_close(found, g.T @ x / (x.square().sum() + 0.3))
    layer, X, G = linear(6, 2, 50)
    white = torch.linalg.qr(X)[0] * 50**0.5
    plain, found = gradients(layer, white, G, lam=0.25)
    torch.testing.assert_close(found, plain / 1.25)


@pytest.mark.parametrize("rows", [5, 40])
def test_scale_and_rotation(rows):
    layer, X, G = linear(8, 3, rows)
    _, found = gradients(layer, X, G, lam=0.1)
    _, scaled = gradients(layer, 7 * X, G, lam=0.1 * 49)
    torch.testing.assert_close(scaled, found / 7)
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.double))[0]
    torch.testing.assert_close(gradients(layer, X @ Q, G, lam=0.1)[1], found @ Q)


def test_lambda_zero_needs_rows_of_full_rank():
    layer, X, G = linear(8, 3, 40)
    torch.testing.assert_close(gradients(layer, X, G, lam=0.0)[1], closed_form(X, G, 0.0))
    for rows in (X[:4], torch.cat([X[:, :7], X[:, :1]], 1)):
        with pytest.raises(InputError, match=r"layer '': lam: .* singular"):
            gradients(layer, rows, G[: len(rows)], lam=0.0)
    with pytest.raises(InputError, match=r"lam: got -0\.1"):
        tract(layer, lam=-0.1)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("scale", [1.0, 255.0])
@pytest.mark.parametrize("rows", [20, 300])
def test_single_precision_is_near_double(rows, scale):
    layer, X, G = linear(60, 4, rows)
    exact = closed_form(scale * X, G, 0.1)
    found = gradients(layer.float(), (scale * X).float(), G.float())[1]
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5


CONVOLUTIONS = [
    (nn.Conv1d, 4, (11,), {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, 3, (9, 7), {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, 3, (9, 8), {"kernel_size": (2, 4), "stride": (2, 1), "padding": (1, 2)}),
    (nn.Conv2d, 4, (12, 12), {"kernel_size": 4, "stride": 4}),
    (nn.Conv2d, 4, (9, 9), {"kernel_size": 3, "groups": 2, "padding": 1}),
    (nn.Conv2d, 4, (9, 9), {"kernel_size": 3, "groups": 4, "stride": 3}),
    (nn.Conv2d, 2, (11, 11), {"kernel_size": 3, "dilation": (2, 3)}),
    (nn.Conv2d, 2, (9, 8), {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, 2, (9, 8), {"kernel_size": 3, "padding": "valid"}),
    (nn.Conv2d, 2, (9, 8), {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}),
    (nn.Conv2d, 2, (9, 8), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, 2, (9, 8), {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv2d, 6, (5, 5), {"kernel_size": 5}),
    (nn.Conv3d, 2, (5, 6, 7), {"kernel_size": (2, 3, 3), "stride": (1, 2, 1), "padding": 1}),
]


def rows_by_impulses(layer, x):
    """X of each group, read off the layer itself: a kernel that is one at a single tap gives that column of X."""
    probe = type(layer)(
        layer.in_channels, layer.groups, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=False, padding_mode=layer.padding_mode,
    ).double()  # fmt: skip
    columns = []
    for tap in range(layer.weight[0].numel()):
        with torch.no_grad():
            probe.weight.zero_().view(layer.groups, -1)[:, tap] = 1
            columns.append(probe(x).transpose(0, 1).flatten(1))
    return torch.stack(columns, -1)


@pytest.mark.parametrize(("kind", "channels", "size", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_are_linear_layers_on_patches(kind, channels, size, options, batch):
    layer = kind(channels, 4, **options).double()
    x = torch.randn(batch, channels, *size, dtype=torch.double)
    g = torch.randn_like(layer(x))
    X = rows_by_impulses(layer, x)
    G = g.transpose(0, 1).reshape(layer.groups, -1, X.shape[1])
    plain, found = gradients(layer, x, g, lam=0.2)
    for k in range(layer.groups):
        part = slice(4 * k // layer.groups, 4 * (k + 1) // layer.groups)
        torch.testing.assert_close(plain[part].flatten(1), G[k] @ X[k])
        torch.testing.assert_close(
            found[part].flatten(1), closed_form(X[k], G[k].T, 0.2), rtol=1e-9, atol=1e-9
        )


def test_an_image_without_batch_and_chunks_of_patches(monkeypatch):
    layer = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.double)
    g = torch.randn(6, 4, 6, 6, dtype=torch.double)
    torch.testing.assert_close(gradients(layer, x[0], g[0])[1], gradients(layer, x[:1], g[:1])[1])
    whole = gradients(layer, x, g)[1]
    monkeypatch.setattr(row_products, "_CHUNK", 1)
    torch.testing.assert_close(gradients(layer, x, g)[1], whole)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(sparse):
    tokens = torch.tensor([[1, 2, 2, 0], [2, 4, 1, 0]])
    layer = nn.Embedding(6, 3, padding_idx=0, sparse=sparse).double()
    g = torch.randn(2, 4, 3, dtype=torch.double)
    _, found = gradients(layer, tokens, g, lam=0.05)
    X, G = F.one_hot(tokens, 6).double().flatten(0, 1), g.flatten(0, 1) * (tokens != 0).flatten()[:, None]
    torch.testing.assert_close(found.to_dense() if sparse else found, closed_form(X, G, 0.05).T)
    assert found.is_sparse == sparse
    # Towards lambda = 0: the mean gradient of each token's occurrences, times N.
    mean = gradients(layer, tokens, g, lam=0.0)[1].to_dense()
    torch.testing.assert_close(mean[2], 8 * g.flatten(0, 1)[tokens.flatten() == 2].mean(0))
    assert torch.isfinite(mean).all() and not mean[5].any()


def test_tokens_non_contiguous_and_empty_input():
    layer = nn.Linear(5, 3).double()
    x = torch.randn(5, 7, 4, dtype=torch.double).permute(2, 1, 0)
    g = torch.randn(4, 7, 3, dtype=torch.double)
    torch.testing.assert_close(
        gradients(layer, x, g)[1], closed_form(x.reshape(-1, 5), g.reshape(-1, 3), 0.1)
    )
    layer.zero_grad()
    with tract(layer):
        layer(x[:0]).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3, padding=1)], ids=["linear", "conv"])
def test_everything_else_is_ordinary(layer):
    layer.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    names, outputs, seen = list(layer.state_dict()), [], []
    for on in (False, True):
        layer.zero_grad()
        mine = x.clone().requires_grad_()
        undo = tract(layer).undo if on else lambda: None
        out = layer(mine)
        out.square().sum().backward()
        outputs.append(out.detach())
        seen.append((layer.bias.grad.clone(), mine.grad))
        assert list(layer.state_dict()) == names
        undo()
    assert (
        torch.equal(*outputs) and torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    )


@pytest.mark.parametrize("rows", [5, 40])
def test_the_papers_second_form(rows):
    # z from corrected inputs, its values overwritten by the true ones: only the weight's gradient changes.
    layer, X, G = linear(8, 3, rows)
    _, found = gradients(layer, X, G, lam=0.1)
    corrected = X @ torch.linalg.inv(X.T @ X / rows + 0.1 * torch.eye(8, dtype=torch.double))
    weight = layer.weight.detach().requires_grad_()
    z = corrected @ weight.T
    (z + (X @ weight.T - z).detach()).backward(G)
    torch.testing.assert_close(found, weight.grad)


def test_stationary_points_stay():
    layer, X, G = linear(5, 2, 20)
    G = G - X @ torch.linalg.lstsq(X, G).solution  # now Gᵀ X = 0
    _, found = gradients(layer, X, G)
    assert float(found.abs().max()) < 1e-12
    plain, found = gradients(layer, *linear(5, 2, 20, seed=1)[1:])
    assert float((plain * found).sum()) > 0
