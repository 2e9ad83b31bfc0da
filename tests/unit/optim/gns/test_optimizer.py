"""The torch optimizer and a user's network: equal to the function, nothing left behind, faults of closures, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import fisher, gauss_newton
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.network import Network
from lineament.optim.gns.optimizer import GNS
from lineament.optim.gns.rules import Smoothness
from lineament.optim.gns.solvers import Dense, LowRank, Operator, StepOptions

LOSS = nn.functional.cross_entropy


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype).eval()
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return net, x, torch.arange(30) % 3


def closure_of(net, x, y):
    return lambda: LOSS(net(x), y)


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "fisher", "true_fisher"])
@pytest.mark.parametrize("dense", [1000, 0])
def test_the_optimizer_walks_where_the_function_walks(kind, dense):
    net, x, y = network()
    data = [(x, y)]
    problem = Network(net, LOSS, data, dense=dense)
    form = problem.curvature(problem.x0, kind)
    small = kind == "fisher"
    assert isinstance(form, LowRank if small else Dense if dense else Operator)
    found = minimize(problem, problem.x0, hess=kind, max_iters=8, step=StepOptions(cg_tol=1e-6))
    curvature = {
        "exact": "exact",
        "gauss_newton": gauss_newton(net, LOSS, data),
        "fisher": fisher(net, LOSS, data, kind="empirical"),
        "true_fisher": fisher(net, LOSS, data, kind="exact"),
    }[kind]
    optimizer = GNS(net.parameters(), curvature=curvature, dense=dense, step=StepOptions(cg_tol=1e-6))
    gammas, losses = [], []
    for _ in range(8):
        gammas.append(optimizer.gamma)
        losses.append(float(optimizer.step(closure_of(net, x, y))))
    assert gammas == found.column("gamma_start")[:8]
    torch.testing.assert_close(losses, found.column("value")[:8], rtol=1e-4, atol=1e-6)
    assert optimizer.counters["solves"] == found.nsolve and optimizer.counters["steps"] == 8
    assert losses[-1] < losses[0]


def test_a_users_network_is_as_it_was_until_load():
    net, x, y = network()
    net.train()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    problem = Network(net, LOSS, [(x, y)], params=["3.*"])
    found = minimize(problem, problem.x0, hess="gauss_newton", grad_tol=1e-4)
    assert found.success and len(found.x) == 21
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert net.training and bool((net[0].weight.grad == 1).all()) and net[3].weight.grad is None
    problem.load(found.x)
    assert torch.equal(net[0].weight, before["0.weight"]) and not torch.equal(
        net[3].weight, before["3.weight"]
    )
    net.eval()
    assert LOSS(net(x), y).item() == pytest.approx(found.fun, rel=1e-12)


def test_last_layer_fits_to_the_optimum_in_few_steps():
    net, x, y = network()
    problem = Network(net, LOSS, [(x, y)], params="3.*")
    for kind in ("exact", "gauss_newton"):
        assert minimize(problem, problem.x0, hess=kind).nit <= 40


def test_float32_models_and_batches():
    net, x, y = network(torch.float32)
    problem = Network(net, LOSS, [(x[:20], y[:20]), (x[20:], y[20:])])
    found = minimize(problem, problem.x0, hess="gauss_newton", grad_tol=1e-3, max_iters=200)
    assert found.success and problem.eps == torch.finfo(torch.float32).eps
    problem.load(found.x)
    assert net[0].weight.dtype == torch.float32


def test_the_optimizer_leaves_grads_and_flags_alone_also_after_an_exception():
    net, x, y = network()
    net[0].weight.requires_grad_(False)
    net[3].bias.grad = torch.ones(3, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    optimizer = GNS(net.parameters())
    calls = []

    def broken():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("data")
        return LOSS(net(x), y)

    with pytest.raises(KeyError):
        optimizer.step(broken)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    optimizer.step(closure_of(net, x, y))
    assert torch.equal(net[0].weight, before["0.weight"]) and not net[0].weight.requires_grad
    assert net[3].weight.grad is None and bool((net[3].bias.grad == 1).all())


def test_resume_equals_the_uninterrupted_run():
    net, x, y = network()
    optimizer = GNS(net.parameters(), gamma=0.5)
    for _ in range(4):
        optimizer.step(closure_of(net, x, y))
    other = copy.deepcopy(net)
    resumed = GNS(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        optimizer.step(closure_of(net, x, y))
        resumed.step(closure_of(other, x, y))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert resumed.counters == optimizer.counters and resumed.gamma == optimizer.gamma


def test_nan_is_raised_or_skipped():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    bad = lambda: (w * float("nan")).sum()  # noqa: E731
    with pytest.raises(InputError, match=r"the loss is nan and 2 of 2 entries .* nonfinite='skip'"):
        GNS([w]).step(bad)
    optimizer = GNS([w], nonfinite="skip")
    optimizer.step(bad)
    assert optimizer.counters["skipped"] == 1 and w.tolist() == [1.0, 1.0] and optimizer.gamma == 1.0
    optimizer.step(lambda: (w**2).sum())
    assert optimizer.counters["steps"] == 1 and float(w.norm()) < 2**0.5


NAN = torch.full((2, 2), float("nan"), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dense": 0},
        {"dense": 0, "step": StepOptions(form="diagonal")},
        {"curvature": lambda: NAN},
        {"curvature": lambda: NAN[0]},
        {"curvature": lambda: LowRank(NAN[:1])},
        {"curvature": lambda: NAN.numpy()},
    ],
    ids=["exact", "products", "diagonal", "matrix", "entries", "form", "array"],
)
def test_a_curvature_that_is_nan_is_raised_or_skipped(options):
    w = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))
    closure = lambda: (w.abs() ** 1.5 + 0.1 * w).sum()  # noqa: E731 (its second derivative at 0 is infinite)
    with pytest.raises(InputError, match=r"curvature: it is not finite at these weights.*nonfinite='skip'"):
        GNS([w], **options).step(closure)
    optimizer = GNS([w], nonfinite="skip", **options)
    assert float(optimizer.step(closure)) == pytest.approx(1.1)
    counters = optimizer.counters
    assert (counters["skipped"], counters["steps"], counters["failed"]) == (1, 0, 0)
    assert counters["solves"] <= 1 and w.tolist() == [0.0, 1.0] and optimizer.gamma == 1.0


@pytest.mark.parametrize("given", [True, False])
def test_running_statistics_are_those_of_the_weights_that_steps_begin_with(given):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    _, x, y = network()
    optimizer = GNS(net.parameters(), gamma=100.0, model=net if given else None)
    for step in range(1, 4):
        alone = copy.deepcopy(net)
        alone(x)
        optimizer.step(closure_of(net, x, y))
        assert (int(net[1].num_batches_tracked) == step) == given
        assert torch.equal(net[1].running_mean, alone[1].running_mean) == given
    assert optimizer.counters["evaluations"] > 6 and net[1].track_running_stats
    with pytest.raises(InputError, match="model: got 'net'"):
        GNS(net.parameters(), model="net")


def test_a_failed_search_changes_nothing():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    calls = []

    def rising():
        calls.append(1)
        return (w**2).sum() + 10 * len(calls)

    optimizer = GNS([w], step=StepOptions(max_probes=5))
    optimizer.step(rising)
    assert optimizer.counters["failed"] == 1 and w.tolist() == [1.0, 1.0] and optimizer.gamma == 1.0


def freed():
    w = nn.Parameter(torch.ones(2))

    def closure():
        loss = (w**2).sum()
        loss.backward()
        return loss

    return GNS([w]).step(closure)


W = nn.Parameter(torch.ones(2))
E = nn.Embedding(3, 2, sparse=True)
BAD = {
    "closure: got None": lambda: GNS([W]).step(),
    "closure: returned None": lambda: GNS([W]).step(lambda: None),
    "closure: returned 3.0": lambda: GNS([W]).step(lambda: 3.0),
    "closure: returned a float32 tensor": lambda: GNS([W]).step(lambda: W * 2),
    "closure: its loss has no graph": lambda: GNS([W]).step(lambda: torch.tensor(1.0)),
    "closure: its graph was freed": freed,
    "dense: got 3 for one group and 1000 for the first": lambda: GNS(
        [{"params": [W]}, {"params": [nn.Parameter(torch.ones(1))], "dense": 3}]
    ),
    "param group: unknown option 'gama'; nearest: 'gamma'": lambda: GNS([{"params": [W], "gama": 3}]),
    "step: got 'cg', expected a StepOptions": lambda: GNS([W], step="cg"),
    "rule: got 'gns', expected a Smoothness": lambda: GNS([W], rule="gns"),
    "its loss is sparse": lambda: GNS(E.parameters()).step(lambda: E(torch.tensor([1])).square().sum()),
    "params: got .*real": lambda: GNS([nn.Parameter(torch.ones(1, dtype=torch.complex64))]),
    "gamma: got -1": lambda: GNS([W], gamma=-1.0),
    "nonfinite: got 'ignore'": lambda: GNS([W], nonfinite="ignore"),
    "curvature: got 'fisher'": lambda: GNS([W], curvature="fisher"),
    "model: got 3": lambda: Network(3, LOSS, []),
    "loader: it is empty": lambda: Network(nn.Linear(1, 1), LOSS, []),
    "loss_fn: it returned": lambda: minimize(
        p := Network(nn.Linear(1, 1), lambda z, y: z, [(torch.ones(3, 1), torch.ones(3))]), p.x0
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(InputError, match=message):
        BAD[message]()


def test_unused_scalar_and_empty_parameters():
    used, unused, empty = (nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in ((), (2,), (0, 3)))
    optimizer = GNS([used, unused, empty], gamma=10.0)
    for _ in range(3):
        optimizer.step(lambda: (used - 3) ** 2)
    assert float(used) == pytest.approx(3.0, abs=1e-6) and unused.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("curvature", [None, lambda: torch.full((2,), 2.0), lambda: 2 * torch.eye(2)])
def test_curvatures_of_the_users_own(curvature):
    w = nn.Parameter(torch.ones(2))
    optimizer = GNS([w], curvature=curvature)
    first = float(optimizer.step(lambda: (w**2).sum()))
    assert float((w**2).sum()) < first


def test_groups_are_one_problem():
    net, x, y = network()
    whole = GNS(net.parameters())
    other = copy.deepcopy(net)
    grouped = GNS([{"params": other[0].parameters()}, {"params": [other[3].weight], "dense": 1000}])
    grouped.add_param_group({"params": [other[3].bias]})
    for _ in range(5):
        assert torch.equal(whole.step(closure_of(net, x, y)), grouped.step(closure_of(other, x, y)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert whole.counters == grouped.counters


def test_nothing_is_there_for_a_scheduler_of_the_rate():
    with pytest.raises(KeyError, match="lr"):
        torch.optim.lr_scheduler.StepLR(GNS([nn.Parameter(torch.ones(2))]), 1)


def test_a_stored_state_holds_the_options_too():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GNS([w], rule=Smoothness(test="gradient"), step=StepOptions(max_probes=9, form="diagonal"))
    other = GNS([v])
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["rule"]["test"] == "gradient" and group["step"]["max_probes"] == 9
    assert "GNS" in repr(copy.deepcopy(other)) and copy.deepcopy(other).curvature == "exact"


@pytest.mark.parametrize("which", ["Adam's", "out of range"])
def test_a_state_that_is_refused_changes_nothing(which):
    w = nn.Parameter(torch.ones(2))
    optimizer = GNS([w])
    optimizer.step(lambda: (w**2).sum())
    before = copy.deepcopy(optimizer.state_dict())
    bad = torch.optim.Adam([w]).state_dict() if which == "Adam's" else copy.deepcopy(before)
    bad["param_groups"][0]["dense"] = -1
    message = "state_dict: got one without gamma, .*expected one of GNS's own"
    with pytest.raises(InputError, match=message if which == "Adam's" else "dense: got -1"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict() == before
