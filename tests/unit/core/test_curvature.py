"""Curvature operators against dense matrices, and the spectra of known matrices."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call

from lineament.core.checks import InputError, NoGradientError
from lineament.core.curvature.density import spectral_density
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.krylov import basis_size, lanczos
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.curvature.traces import trace
from lineament.core.gradients import flatten, per_sample_gradients, unflatten


def problem(loss: str = "ce", seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    net(3 * torch.randn(32, 4).double())
    x = torch.randn(11, 4).double()
    y = torch.randn(11, 3).double() if loss == "mse" else torch.randint(0, 3, (11,))
    loader = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    return net, (F.mse_loss if loss == "mse" else F.cross_entropy), loader, x, y


def dense_hessian(net, loss_fn, x, y, *, training=False):
    net.train(training)
    leaves = [p.detach() for p in net.parameters()]
    names = [n for n, _ in net.named_parameters()]

    def risk(vector):
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return loss_fn(
            functional_call(net, {**dict(zip(names, unflatten(vector, leaves))), **buffers}, (x,)), y
        )

    return torch.autograd.functional.hessian(risk, flatten(leaves))


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
@pytest.mark.parametrize("chunk", [None, 3])
def test_hessian_is_the_dense_one_over_uneven_batches(loss, cache_bytes, chunk):
    net, loss_fn, loader, x, y = problem(loss)
    operator = hessian(net, loss_fn, loader, cache_bytes=cache_bytes, chunk=chunk)
    for _ in range(2):
        torch.testing.assert_close(operator.dense(), dense_hessian(net, loss_fn, x, y))


def test_a_block_is_its_columns_and_the_operator_is_symmetric():
    net, loss_fn, loader, *_ = problem()
    operator = hessian(net, loss_fn, loader)
    # Enough vectors to go through the graph together, and two that are left over.
    block = torch.randn(operator.shape[0], 10, dtype=torch.float64)
    product = operator @ block
    torch.testing.assert_close(product[:, 1], operator @ block[:, 1])
    cross = block.T @ product
    torch.testing.assert_close(cross, cross.T)


def test_train_mode_batch_norm_uses_the_batch_and_leaves_the_running_statistics():
    net, loss_fn, _, x, y = problem()
    before = [b.clone() for b in net.buffers()]
    found = hessian(net, loss_fn, [(x, y)], batchnorm="train").dense()
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers()))
    torch.testing.assert_close(found, dense_hessian(net, loss_fn, x, y, training=True))


def jacobian(net, x):
    net.eval()
    leaves = [p.detach() for p in net.parameters()]
    names = [n for n, _ in net.named_parameters()]
    return torch.autograd.functional.jacobian(
        lambda v: functional_call(net, dict(zip(names, unflatten(v, leaves))), (x,)), flatten(leaves)
    )


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_gauss_newton_is_the_sandwich_and_the_exact_fisher(loss):
    net, loss_fn, loader, x, _ = problem(loss)
    j = jacobian(net, x)
    z = net(x).detach()
    expected = torch.zeros(j.shape[-1], j.shape[-1], dtype=torch.float64)
    for i in range(len(x)):
        p = z[i].softmax(0)
        middle = torch.diag(p) - torch.outer(p, p) if loss == "ce" else 2 / 3 * torch.eye(3).double()
        expected += j[i].T @ middle @ j[i] / len(x)
    torch.testing.assert_close(gauss_newton(net, loss_fn, loader).dense(), expected)
    torch.testing.assert_close(fisher(net, loss_fn, loader, kind="exact").dense(), expected)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_empirical_fisher_is_the_mean_of_outer_products(loss):
    net, loss_fn, loader, x, y = problem(loss)
    per_sample = per_sample_gradients(net, loss_fn, x, y)
    g = torch.cat([v.flatten(1) for v in per_sample.values()], dim=1)
    torch.testing.assert_close(fisher(net, loss_fn, loader, kind="empirical").dense(), g.T @ g / len(x))


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_sampled_fisher_tends_to_the_exact_one_and_is_one_matrix(loss):
    net, loss_fn, loader, *_ = problem(loss)
    exact = fisher(net, loss_fn, loader, kind="exact").dense()
    few = fisher(net, loss_fn, loader, samples=2, cache_bytes=0)
    v = torch.randn(few.shape[0], dtype=torch.float64)
    assert torch.equal(few @ v, few @ v)

    def error(samples):
        return (fisher(net, loss_fn, loader, samples=samples).dense() - exact).norm() / exact.norm()

    assert error(300) < 0.12
    assert error(300) < error(4)


def test_a_change_of_the_weights_is_noticed():
    net, loss_fn, loader, x, y = problem()
    operator = hessian(net, loss_fn, loader)
    operator.dense()
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    torch.testing.assert_close(operator.dense(), dense_hessian(net, loss_fn, x, y))


def test_a_subset_of_the_parameters_is_a_block_of_the_matrix():
    net, loss_fn, loader, *_ = problem()
    whole = hessian(net, loss_fn, loader).dense()
    part = hessian(net, loss_fn, loader, params="3.*")
    assert part.names == ["3.weight", "3.bias"]
    torch.testing.assert_close(part.dense(), whole[-18:, -18:])


def test_nothing_is_left_behind():
    net, loss_fn, loader, *_ = problem()
    net.train()
    net[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    operator = hessian(net, loss_fn, loader)
    operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert net.training and all(p.grad is None for p in net.parameters()) and not net[0].weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert operator.shape[0] == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_fused_attention_has_its_second_derivative():
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v).mean(1)

    net = Attend().double()
    x, y = torch.randn(3, 5, 4).double(), torch.randint(0, 4, (3,))
    found = hessian(net, F.cross_entropy, [(x, y)]).dense()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(found, dense_hessian(net, F.cross_entropy, x, y))


def test_scipy_takes_the_operator():
    net, loss_fn, loader, *_ = problem()
    operator = hessian(net, loss_fn, loader)
    values = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert np.allclose(sorted(values), torch.linalg.eigvalsh(operator.dense())[-3:].numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n, f, d: hessian(n, f, []), "empty"),
        (lambda n, f, d: hessian(n, f, iter(d)), "walked only once"),
        (lambda n, f, d: hessian(n, f, d, params="5.*"), "names no parameter"),
        (lambda n, f, d: hessian(n, f, [d[0][0]]), "expected \\(inputs, targets\\)"),
        (lambda n, f, d: fisher(n, lambda z, y: z.sum(), d), "cannot be known from the loss"),
    ],
)
def test_bad_input_is_named_before_any_work(make, message):
    net, loss_fn, loader, *_ = problem()
    with pytest.raises(InputError, match=message):
        make(net, loss_fn, loader)


def test_nan_in_the_loss_the_data_or_the_weights_is_said():
    net, loss_fn, loader, x, y = problem()
    v = torch.ones(sum(p.numel() for p in net.parameters())).double()
    with pytest.raises(InputError, match="NaN or infinite"):
        hessian(net, loss_fn, [(x * float("nan"), y)]) @ v
    with pytest.raises(InputError, match="expected a scalar"):
        hessian(net, lambda z, t: F.cross_entropy(z, t, reduction="none"), loader) @ v
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"weights hold NaN.*0\.weight"):
        hessian(net, loss_fn, loader)


@pytest.mark.parametrize("make", [gauss_newton, fisher])
def test_a_block_of_gauss_newton_and_fisher_is_its_columns(make):
    net, loss_fn, loader, *_ = problem()
    operator = make(net, loss_fn, loader)
    block = torch.randn(operator.shape[0], 9, dtype=torch.float64)
    torch.testing.assert_close(operator @ block, torch.stack([operator @ v for v in block.T], 1))


def test_a_model_whose_operations_know_no_blocks_is_multiplied_column_by_column():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g + 0.0 * float(g.detach().sum())

    class Net(nn.Linear):
        def forward(self, input):
            return Cube.apply(super().forward(input))

    net = Net(3, 2).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    operator = gauss_newton(net, F.mse_loss, [(x, y)])
    block = torch.randn(8, 3).double()
    torch.testing.assert_close(operator @ block, torch.stack([operator @ v for v in block.T], 1))


@pytest.mark.parametrize("last", [False, True])
def test_the_fisher_of_token_models_averages_over_positions(last):
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x):
            z = self.inner(x)
            return z if last else z.transpose(1, 2)

    def loss_fn(z, y):
        return F.cross_entropy(z.transpose(1, 2) if last else z, y)

    net = Tokens().double()
    loader = [(torch.randn(6, 4, 2).double(), torch.randint(0, 3, (6, 4)))]
    exact = gauss_newton(net, loss_fn, loader).dense()
    found = fisher(net, loss_fn, loader, likelihood="categorical", samples=4000).dense()
    assert (found - exact).norm() / exact.norm() < 0.05


def test_the_fisher_of_independent_answers_is_the_gauss_newton_matrix():
    torch.manual_seed(0)
    net = nn.Linear(2, 4).double()
    loader = [(torch.randn(6, 2).double(), torch.randint(0, 2, (6, 4)).double())]
    exact = fisher(net, F.binary_cross_entropy_with_logits, loader, kind="exact").dense()
    found = fisher(net, nn.BCEWithLogitsLoss(), loader, samples=4000).dense()
    assert (found - exact).norm() / exact.norm() < 0.05


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return {"logits": self.head(torch.tanh(self.embed(tokens)).mean(1))}


def test_tied_weights_count_once_and_a_dict_holds_the_logits():
    torch.manual_seed(0)
    net = Tied().double()
    tokens, y = torch.randint(0, 5, (7, 4)), torch.randint(0, 5, (7,))
    operator = hessian(net, F.cross_entropy, [({"tokens": tokens}, y)])
    assert operator.names == ["embed.weight"]

    def risk(w):
        z = torch.tanh(w.reshape(5, 3)[tokens]).mean(1) @ w.reshape(5, 3).T
        return F.cross_entropy(z, y)

    flat = net.embed.weight.detach().flatten()
    torch.testing.assert_close(operator.dense(), torch.autograd.functional.hessian(risk, flat))


def test_a_transformer_is_taken_as_it_is():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=4, vocab_size=7, n_positions=5, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2LMHeadModel(config).double().train()
    tokens = torch.randint(0, 7, (3, 5))

    def loss_fn(z, y):
        return F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:])

    operator = hessian(net, loss_fn, [({"input_ids": tokens}, tokens)])
    u, v = torch.randn(2, operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(u @ (operator @ v), v @ (operator @ u))

    # The same by PyTorch alone, on attention written out.
    net.set_attn_implementation("eager")
    leaves = list(net.eval().parameters())
    grads = torch.autograd.grad(loss_fn(net(tokens).logits, tokens), leaves, create_graph=True)
    along = torch.autograd.grad(grads, leaves, list(operator.split(v).values()))
    torch.testing.assert_close(operator @ v, flatten(along))


class Counted:
    def __init__(self, batches):
        self.batches, self.walks = batches, 0

    def __iter__(self):
        self.walks += 1
        # Another order each time, as a shuffling loader's.
        return iter(self.batches[self.walks % 3 :] + self.batches[: self.walks % 3])


@pytest.mark.parametrize("cache_bytes", [0, 3000, 10**9])
def test_a_shuffling_loader_gives_one_matrix_and_is_walked_once_where_memory_allows(cache_bytes):
    net, loss_fn, loader, x, y = problem()
    counted = Counted(loader)
    operator = hessian(net, loss_fn, counted, cache_bytes=cache_bytes)
    v = torch.randn(operator.shape[0]).double()
    expected = dense_hessian(net, loss_fn, x, y) @ v
    for _ in range(3):
        torch.testing.assert_close(operator @ v, expected)
    assert counted.walks == (2 if cache_bytes == 10**9 else 4)


def test_train_mode_batches_cannot_be_split():
    net, loss_fn, loader, *_ = problem()
    with pytest.raises(InputError, match="cannot be split"):
        hessian(net, loss_fn, loader, batchnorm="train", chunk=2)


def test_new_running_statistics_are_noticed():
    net, loss_fn, loader, x, y = problem()
    operator = hessian(net, loss_fn, loader)
    operator.dense()
    net[2].running_var.mul_(3.0)
    torch.testing.assert_close(operator.dense(), dense_hessian(net, loss_fn, x, y))


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)).double()).Q
    return q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.T


def test_lanczos_is_orthonormal_and_reproduces_the_matrix():
    matrix = symmetric(torch.linspace(-1, 3, 30))
    run = lanczos(matrix, 30)
    torch.testing.assert_close(run.basis.T @ run.basis, torch.eye(30).double())
    torch.testing.assert_close(run.ritz()[0], torch.linspace(-1, 3, 30).double())


def test_lanczos_finds_repeated_eigenvalues_after_a_breakdown():
    matrix = symmetric([2.0] * 5 + [1.0] * 3)
    torch.testing.assert_close(lanczos(matrix, 8).ritz()[0], torch.tensor([1.0] * 3 + [2.0] * 5).double())


def spiked():
    """Eight eigenvalues far from a continuum, which Lanczos finds first and then again."""
    return symmetric(
        torch.cat([torch.linspace(0, 1, 292), torch.tensor([2.0**k for k in range(3, 11)])]).double()
    ).float()


def ghosts(how: str, window: int = 10) -> int:
    """How often the largest eigenvalue comes back."""
    found = spectral_density(spiked(), steps=80, probes=1, reorthogonalise=how, window=window)
    return int((found.nodes > 1000).sum()) - 1


def test_each_reorthogonalisation_does_what_its_name_says():
    # In single precision, after 80 steps, the bare recurrence has lost its first vectors several times over.
    assert ghosts("none") >= 2 and ghosts("window", 3) >= 2
    assert ghosts("full") == ghosts("selective") == 0
    # A window as long as the run is all of it.
    wide = spectral_density(spiked(), steps=80, probes=1, reorthogonalise="window", window=80)
    full = spectral_density(spiked(), steps=80, probes=1)
    torch.testing.assert_close(wide.nodes, full.nodes)


@pytest.mark.parametrize("how", ["full", "window", "selective", "none"])
def test_moments_hold_with_any_reorthogonalisation(how):
    # Ghosts share a weight between copies of an eigenvalue, so that no moment feels them.
    found = spectral_density(spiked(), steps=80, probes=2, reorthogonalise=how, seed=3)
    full = spectral_density(spiked(), steps=80, probes=2, seed=3)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2).double())
    torch.testing.assert_close(found.moments, full.moments, rtol=1e-4, atol=0)
    assert found.to_dict()["seed"] == 3


def test_what_is_kept_follows_the_reorthogonalisation():
    assert [basis_size(80, how, 10) for how in ("full", "selective", "window", "none")] == [80, 80, 10, 2]
    with pytest.raises(InputError, match="reorthogonalise"):
        spectral_density(torch.eye(3), reorthogonalise="fully")
    with pytest.raises(InputError, match="window"):
        spectral_density(torch.eye(3), reorthogonalise="window", window=1)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_top_eigenpairs_at_either_end(which):
    values = torch.cat([torch.linspace(-1, 1, 190), torch.tensor([9.0, 5.0, 3.0, -7.0, -4.0])]).double()
    matrix = symmetric(values)
    found = top_eigenpairs(matrix, 2, which=which, tol=1e-9)
    expected = {"largest": [9, 5], "smallest": [-7, -4], "both": [9, 5, -7, -4], "magnitude": [9, -7]}[which]
    assert found.converged and found.products < 195
    torch.testing.assert_close(found.values, torch.tensor(expected).double())
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (residuals < 1e-7).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_least_eigenvalue_is_not_just_any_that_is_small_beside_the_greatest(seed):
    values = torch.cat([torch.linspace(-0.02, 0.02, 300), torch.tensor([10.0, 4.0, -0.2, -0.15])]).double()
    found = top_eigenpairs(symmetric(values), 1, which="both", tol=2e-2, seed=seed)
    assert found.converged
    torch.testing.assert_close(found.values, torch.tensor([10.0, -0.2]).double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_values_alone_are_as_accurate_as_asked_for_in_fewer_products(tol, seed):
    values = torch.cat([torch.linspace(-1, 1, 290), torch.tensor([3.0, 2.5, 2.0, -1.8])]).double()
    matrix = symmetric(values)
    vectors = top_eigenpairs(matrix, 2, tol=tol, seed=seed)
    found = top_eigenpairs(matrix, 2, tol=tol, accurate="values", seed=seed)
    assert found.converged and found.products <= vectors.products
    assert float((found.values - torch.tensor([3.0, 2.5]).double()).abs().max()) <= tol * 3
    if tol < 1e-3:
        assert found.products < vectors.products


def test_values_alone_of_a_matrix_smaller_than_the_space():
    found = top_eigenpairs(symmetric([3.0, 1.0, -2.0]), 3, accurate="values", which="magnitude")
    assert found.converged
    torch.testing.assert_close(found.values, torch.tensor([3.0, -2.0, 1.0]).double())
    with pytest.raises(InputError, match="accurate"):
        top_eigenpairs(symmetric([3.0, 1.0]), 1, accurate="value")  # pyright: ignore


def test_top_eigenpairs_restart_when_the_spectrum_is_dense_and_say_when_they_stop_short():
    matrix = symmetric(torch.linspace(0, 1, 400))
    found = top_eigenpairs(matrix, 3, tol=1e-6, max_products=2000)
    assert found.converged
    torch.testing.assert_close(
        found.values, torch.linspace(0, 1, 400).double().flip(0)[:3], atol=1e-6, rtol=0
    )
    short = top_eigenpairs(matrix, 3, tol=1e-12, max_products=20)
    assert not short.converged and short.products <= 20


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace_is_unbiased_and_its_error_is_honest(method):
    matrix = symmetric([2.0**-i for i in range(60)] + [-0.01] * 20)
    true = float(torch.trace(matrix))
    runs = [trace(matrix, 24, method=method, seed=s) for s in range(200)]
    values = torch.tensor([r.value for r in runs])
    spread = float(values.std())
    assert abs(float(values.mean()) - true) < 4 * spread / 200**0.5
    assert 0.3 < sum(r.standard_error for r in runs) / 200 / spread < 3


def test_xtrace_is_exact_on_low_rank_and_better_than_hutchinson():
    low = symmetric([5.0, -3.0, 1.0] + [0.0] * 40)
    assert abs(trace(low, 20).value - 3.0) < 1e-10
    matrix = symmetric([2.0**-i for i in range(80)])
    errors = {
        m: sum(abs(trace(matrix, 24, method=m, seed=s).value - 2) for s in range(20))
        for m in ("xtrace", "hutch++", "hutchinson")
    }
    assert errors["xtrace"] < errors["hutch++"] < errors["hutchinson"]


def test_density_has_the_moments_and_the_mass_of_the_matrix():
    values = torch.cat([torch.zeros(150), torch.linspace(1, 2, 50)]).double()
    density = spectral_density(symmetric(values), steps=30, probes=12)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(12).double())
    for power in range(1, 5):
        error = abs(float(density.moments[power - 1] - (values**power).mean()))
        assert error < 4 * float(density.moment_errors[power - 1]) + 1e-9
    grid, curve = density.curve(sigma=0.02)
    assert abs(float(torch.trapezoid(curve, grid)) - 1) < 1e-3
    near_zero = float(torch.trapezoid(curve[grid < 0.5], grid[grid < 0.5]))
    assert abs(near_zero - 0.75) < 0.1


def test_results_plot_and_give_plain_numbers():
    matrix = symmetric([3.0, 2.0, 1.0])
    for result in (top_eigenpairs(matrix, 2), spectral_density(matrix, steps=3)):
        assert result.plot().get_xlabel()
        assert isinstance(result.to_dict(), dict)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(k):
    matrix = symmetric([5.0] * 3 + [3.0] * 2 + [0.0] * 100 + [-1.0] * 2)
    found = top_eigenpairs(matrix, k, tol=1e-8)
    torch.testing.assert_close(found.values, torch.tensor([5.0, 5.0, 5.0, 3.0, 3.0]).double()[:k])
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k).double())


@pytest.mark.parametrize("limit", [20, 25, 40])
def test_no_more_products_than_allowed(limit):
    calls = 0
    matrix = symmetric(torch.linspace(0, 1, 300))

    class Counting:
        shape, dtype, device = matrix.shape, matrix.dtype, matrix.device

        def __matmul__(self, v):
            nonlocal calls
            calls += 1 if v.ndim == 1 else v.shape[1]
            return matrix @ v

    found = top_eigenpairs(Counting(), 3, tol=1e-12, max_products=limit)
    assert calls == found.products <= limit and not found.converged
    actual = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(actual, found.residuals)


def test_probes_in_step_are_those_run_one_after_another(monkeypatch):
    matrix = symmetric([2.0] * 5 + [1.0] * 3 + [-1.0] * 4)
    together = spectral_density(matrix, steps=8, probes=3)
    monkeypatch.setattr("lineament.core.curvature.density._BASES_BYTES", 1)
    apart = spectral_density(matrix, steps=8, probes=3)
    torch.testing.assert_close(together.moments, apart.moments)
    torch.testing.assert_close(together.moment_errors, apart.moment_errors)


def test_the_quadrature_is_exact_up_to_its_degree():
    matrix = symmetric(torch.linspace(-1, 2, 40))
    start = torch.randn(40).double()
    start /= start.norm()
    values, vectors = lanczos(matrix, 4, start=start).ritz()
    for power in range(8):
        exact = start @ torch.linalg.matrix_power(matrix, power) @ start
        torch.testing.assert_close((vectors[0].square() * values**power).sum(), exact)


def test_a_trace_plots_with_its_error():
    found = trace(symmetric([3.0, 2.0, 1.0, 0.5]), 3, method="hutchinson")
    assert found.plot().get_ylabel() == "trace"
    assert found.to_dict()["products"] == 3
    assert trace(torch.eye(3), 1, method="hutchinson").to_dict()["standard_error"] is None


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Products:
    """A matrix known by its products alone, each rounded as its dtype has it."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, other):
        return self.matrix @ other


@pytest.mark.parametrize("made", [lambda matrix: matrix, Products], ids=["matrix", "products"])
@pytest.mark.parametrize("dtype", DTYPES)
class TestRounding:
    """No threshold takes for rounding what is a direction, in any precision and at any size."""

    @pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
    def test_trace(self, method, dtype, made):
        found = trace(made(torch.eye(256, dtype=dtype)), 20, method=method)
        # Hutch++ samples what its sketch leaves, in which signs are not signs any more.
        sampled = 4 * found.standard_error if method == "hutch++" else 0.0
        assert abs(found.value - 256) <= sampled + 256 * torch.finfo(dtype).eps
        assert found.standard_error != 0 and not found.standard_error > 4

    @pytest.mark.parametrize("method", ["xtrace", "hutch++"])
    def test_trace_of_one_direction_above_many(self, method, dtype, made):
        high = 1e4 if dtype == torch.float16 else 1e5
        diagonal = torch.cat([torch.tensor([high]), torch.ones(999)]).to(dtype)
        found = trace(made(torch.diag(diagonal)), 30, method=method)
        wrong = abs(found.value - float(diagonal.double().sum()))
        assert found.standard_error > 0 and wrong < 4 * found.standard_error
        if dtype not in (torch.float16, torch.bfloat16):
            assert found.standard_error < 2

    def test_trace_of_low_rank(self, dtype, made):
        diagonal = torch.cat([torch.ones(3), torch.zeros(297)]).to(dtype)
        found = trace(made(torch.diag(diagonal)), 30)
        assert found.value == pytest.approx(3, rel=4 * torch.finfo(dtype).eps) and found.standard_error > 0

    def test_eigenpairs(self, dtype, made):
        matrix = torch.diag(torch.tensor([3.0] + [1.0] * 99)).to(dtype)
        found = top_eigenpairs(made(matrix), 1)
        assert float(found.values) == pytest.approx(3, rel=max(1e-3, torch.finfo(dtype).eps))
        true = matrix.double() @ found.vectors.double() - found.vectors.double() * found.values.double()
        assert float(true.norm()) < 1.5 * max(float(found.residuals), 1e-3)
        assert found.values.dtype == torch.promote_types(dtype, torch.float32)

    def test_density(self, dtype, made):
        matrix = torch.diag(torch.tensor([3.0] + [1.0] * 99)).to(dtype)
        found = spectral_density(made(matrix), steps=4)
        assert float(found.moments[1]) == pytest.approx(1.08, rel=24 * torch.finfo(dtype).eps)
        assert float(found.nodes.max()) == pytest.approx(3, rel=24 * torch.finfo(dtype).eps)


def test_no_error_is_zero_where_all_samples_are_the_same():
    swap = torch.zeros(50, 50)
    swap[0, 1] = swap[1, 0] = 1.0
    seeds = [trace(swap, 2, method="hutchinson", seed=seed) for seed in range(8)]
    same = [found for found in seeds if abs(found.value) == 2]
    assert same and all(np.isnan(found.standard_error) for found in same)
    assert bool(spectral_density(torch.eye(50), steps=2).moment_errors.isnan().all())


@pytest.mark.parametrize("products", [4, 9])
def test_the_trace_is_exact_with_as_many_products_as_directions(products):
    matrix = symmetric([5.0, 1.0, -3.0, 0.0])
    for method in ("xtrace", "hutch++"):
        found = trace(matrix, products, method=method)
        assert found.value == pytest.approx(3, abs=1e-12)
        assert (found.standard_error, found.products) == (0.0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_parallel_images_leave_an_orthonormal_basis(dtype):
    matrix = symmetric([5.0] * 3 + [3.0] * 2 + [0.0] * 100 + [-1.0] * 2).to(dtype)
    found = top_eigenpairs(matrix, 3, tol=1e-5)
    torch.testing.assert_close(found.values, torch.full((3,), 5.0, dtype=dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(3, dtype=dtype), rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 4, 5, 6, 8])
def test_a_strided_convolution_of_one_place_has_its_hessian(channels):
    """The shortcut of a narrow residual network: the kernel for channels that lie last wrote past its memory."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 6, 1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 3))
    x, y = torch.randn(2, channels, 8, 8), torch.tensor([0, 2])
    v = torch.randn(sum(p.numel() for p in net.parameters()))
    for _ in range(10):
        found = hessian(net, F.cross_entropy, [(x, y)]) @ v
    exact = hessian(copy.deepcopy(net).double(), F.cross_entropy, [(x.double(), y)]) @ v.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


OPERATORS = {"hessian": hessian, "gauss_newton": gauss_newton, "empirical": fisher}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_of_half_precision_is_differentiated_in_single(make, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    x, y = torch.randn(12, 3).to(dtype), torch.randint(0, 2, (12,))
    operator = make(net, F.cross_entropy, [(x, y)], **({"kind": "exact"} if make is fisher else {}))
    assert operator.dtype == torch.float32 and all(p.dtype == dtype for p in net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = operator.dense()
    reference = make(
        net.double(), F.cross_entropy, [(x.double(), y)], **({"kind": "exact"} if make is fisher else {})
    )
    torch.testing.assert_close(found, reference.dense().float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("before", [[], [nn.Conv1d(1, 2, 1), nn.Flatten()]], ids=["all", "a part"])
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network_is_said_to_let_no_gradient_through(make, before):
    net = nn.Sequential(*before, nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    x = torch.randn(3, 1, 2) if before else torch.randn(3, 4)
    with pytest.raises(NoGradientError, match="gradients cannot pass through its quantised layer"):
        make(quantised, F.mse_loss, [(x, torch.randn(3, 2))])


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
def test_a_network_that_detaches_lets_no_gradient_through(make):
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    operator = make(
        Detached(2, 2),
        F.mse_loss,
        [(torch.randn(3, 2), torch.randn(3, 2))],
        **({"likelihood": "gaussian"} if make is fisher else {}),
    )
    with pytest.raises(NoGradientError, match="cannot pass from its output to 'weight'"):
        operator @ torch.ones(6)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *g):
        return 2 * g[0] * ctx.saved_tensors[0]


class Then(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.gate = nn.Linear(2, 2).double(), nn.Module()
        self.gate.forward = function

    def forward(self, x):
        return self.gate(self.layer(x))


SINGLE = {
    "hardsigmoid": (F.hardsigmoid, lambda z: (z / 6 + 0.5).clamp(0, 1)),
    "cdist": (lambda z: torch.cdist(z, z.new_ones(3, 2)), lambda z: (z[:, None] - 1).square().sum(-1).sqrt().repeat(1, 3)),
    "cdist of p 1": (lambda z: torch.cdist(z, z.new_ones(3, 2), p=1.0), lambda z: (z[:, None] - 1).abs().sum(-1).repeat(1, 3)),
    "once": (Once.apply, torch.square),
}  # fmt: skip


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("what", SINGLE)
@pytest.mark.parametrize("columns", [1, 30])
def test_operations_without_a_second_derivative(make, what, columns):
    function, twice = SINGLE[what]
    x, width = torch.randn(5, 2, dtype=torch.float64), 3 if "cdist" in what else 2
    data = [(x, torch.randn(5, width, dtype=torch.float64))]
    options = {"kind": "empirical"} if make is fisher else {}
    operator = make(Then(function), F.mse_loss, data, **options)
    block = torch.randn(6, columns, dtype=torch.float64)
    if what == "once" and make is hessian:
        with pytest.raises(
            InputError, match=r"model: 'gate' \(Module\) has no second derivative.*use gauss_newton"
        ):
            operator @ block
        return
    torch.testing.assert_close(operator @ block, make(Then(twice), F.mse_loss, data, **options) @ block)


WEIGHTS = torch.tensor([1.0, 5.0, 0.2])
UNEVEN = {
    "functional": F.cross_entropy,
    "ignored": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS.double()),
    "partial": functools.partial(F.cross_entropy, weight=WEIGHTS.double(), ignore_index=2),
    "measured": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS.double(), ignore_index=2),
}


@pytest.mark.parametrize("make", [hessian, gauss_newton])
@pytest.mark.parametrize("loss", UNEVEN.values(), ids=UNEVEN.keys())
def test_the_chunk_never_changes_the_matrix(make, loss):
    torch.manual_seed(0)
    net = nn.Linear(2, 3).double()
    x, y = torch.randn(12, 2).double(), torch.tensor([0, 0, 0, 2, 2, 2, 1, 0, 1, 2, -100, 1])
    y = y if loss is F.cross_entropy else y.clamp_min(0)
    whole = make(net, loss, [(x, y)]).dense()
    torch.testing.assert_close(whole, dense_hessian(net, loss, x, y))
    for chunk in (1, 3, 5):
        torch.testing.assert_close(make(net, loss, [(x, y)], chunk=chunk).dense(), whole)


@pytest.mark.parametrize("kind", ["true", "exact", "empirical"])
@pytest.mark.parametrize("positions", [(), (4,)])
def test_the_chunk_never_changes_a_fisher_with_ignored_targets(kind, positions):
    torch.manual_seed(0)
    net = nn.Linear(2, 3).double()
    x = torch.randn(6, *positions, 2, dtype=torch.float64)
    y = torch.randint(0, 3, (6, *positions))
    y[0] = -100
    y[2:, ...].view(-1)[::3] = -100

    def loss(z, y):
        return F.cross_entropy(z.movedim(-1, 1), y)

    options = {"kind": kind, "likelihood": "categorical", "samples": 2000 if kind == "true" else 1}
    whole = fisher(net, loss, [(x, y)], **options).dense()
    exact = gauss_newton(net, loss, [(x, y)]).dense()
    if kind != "empirical":
        assert (whole - exact).norm() < (0.1 if kind == "true" else 1e-9) * exact.norm()
    for chunk in (1, 4):
        found = fisher(net, loss, [(x, y)], chunk=chunk, **options).dense()
        # Each chunk has draws of its own.
        assert (found - whole).norm() < (0.1 if kind == "true" else 1e-9) * whole.norm()


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
def test_everything_may_be_made_and_multiplied_in_inference_mode(make):
    options = {"kind": "empirical"} if make is fisher else {}
    with torch.inference_mode():
        net = nn.Linear(1, 1)
        data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        found = make(net, F.mse_loss, data, **options) @ torch.ones(2)
    assert not found.is_inference() and net.weight.is_inference()
    torch.testing.assert_close(found, make(net, F.mse_loss, data, **options) @ torch.ones(2))
